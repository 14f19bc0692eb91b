"""Which layers of a conversion get an `input_scale`, from a calibration."""

from __future__ import annotations

from ..errors import FileError, SpecError
from ..plan import QuantPlan
from .calibration import LARGEST, Calibration, read_calibration
from .convert_plan import Request
from .layer_rows import INPUT_SCALE
from .writers.base import Writer


def input_scales(request: Request, plan: QuantPlan, writer: Writer) -> tuple[dict[str, float], list[str]]:
    """The `input_scale` of each layer, and a warning where layers have none.

    Raises:
        FileError: no calibration, or one of another model.
        SpecError: a layout or formats without such scales.
    """
    if request.scales is None:
        return {}, []
    kinds = ", ".join(LARGEST)
    if INPUT_SCALE not in writer.beside_layers:
        raise SpecError(f"The layout {writer.id} has no input_scale.\nLeave --scales out, or convert to {kinds}.")
    wanted = {d.meta.name: d.spec.format_id for d in plan.to_quantize if d.spec and d.spec.format_id in LARGEST}
    if not wanted:
        raise SpecError(
            f"{plan.spec.format_id} has no input_scale: it scales inputs as they come.\n"
            f"Leave --scales out; formats with one are {kinds}."
        )
    calibration = read_calibration(request.scales)
    _refuse_other_model(request, plan, calibration)
    found = {name: calibration.input_scale(name, format_id) for name, format_id in wanted.items()}
    missing = [name for name, scale in found.items() if scale is None]
    if len(missing) == len(wanted):
        raise FileError(f"{request.scales.name}: holds none of the layers.\nIt was recorded with another model.")
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    doubts = [f"'{missing[0]}'{more}: no input was recorded, so there is no input_scale"] if missing else []
    return {name: scale for name, scale in found.items() if scale is not None}, doubts


def _refuse_other_model(request: Request, plan: QuantPlan, calibration: Calibration) -> None:
    for d in plan.to_quantize:
        inputs = calibration.layers.get(d.meta.name)
        if inputs is not None and request.scales is not None and inputs.columns != d.meta.shape[1]:
            raise FileError(
                f"{request.scales.name}: '{d.meta.name}' has {inputs.columns} columns there, {d.meta.shape[1]} in "
                f"{request.source.name}.\nIt was recorded with another model."
            )
