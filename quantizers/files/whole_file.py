"""What is wrong between the tensors of a file, beyond what each scheme says of its own layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .edits import Edit, Form
from .faults import Fault
from .fixes import relocated
from .model_file import ModelFile
from .schemes.scan import Scan

Found = tuple[Fault, str, tuple[str, Edit] | None]

# Tensors that mean nothing without the weight of their layer.
COMPANIONS = (
    *("weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale", "pre_quant_scale", "comfy_quant"),
    *("scale_weight", "scale_input", "weight_s_rel", "weight_s_channel", "weight_codebook", "SCB", "weight_format"),
)
_ORPHAN = "Loaders pass over it; if the layer has lost its weight, they fail or leave it as it was initialized."
_SCALED_MM = (
    "Works where ComfyUI dequantizes; where the GPU multiplies fp8 or nvfp4 itself, torch stops: it takes F32 scales."
)


def misplaced(file: ModelFile, scan: Scan) -> Iterator[Found]:
    """Scales and the like whose weight stands under another prefix, or nowhere."""
    for module, lasts in file.groups.items():
        if "weight" in lasts or f"{module}.weight" in scan.layers:
            continue
        lost = [last for last in lasts if last in COMPANIONS and f"{module}.{last}" not in scan.owner]
        if not lost:
            continue
        place = relocated(file, module, "weight")
        rename = {f"{module}.{last}": f"{place}.{last}" for last in lost}
        if place is not None and not any(name in file.entries for name in rename.values()):
            text = f"'{module}.{lost[0]}' belongs to '{place}.weight', which has another prefix."
            effect = "Loaders do not bring them together: the packed values pass for the weight, an error or noise."
            fault = Fault("prefix-mismatch", module, text, effect)
            yield fault, "error", ("its tensors get the prefix of the weight", Edit(rename=rename))
        else:
            text = f"'{module}.{lost[0]}' is there without '{module}.weight'."
            yield Fault("scale-without-weight", module, text, _ORPHAN), "warning", None


def scale_forms(file: ModelFile, scan: Scan) -> Iterator[Found]:
    """Scales of ComfyUI's formats in another dtype, or with another number of dimensions, than it writes them."""
    for layer in scan.layers.values():
        if layer.scheme != "comfy" or not layer.format_id:
            continue
        for role, name in layer.tensors.items():
            entry = file.entries[name]
            if entry.dtype not in ("F16", "BF16", "F32", "F64") or role == "pre_quant_scale":
                continue
            shape = () if entry.numel == 1 and len(entry.shape) == 1 else entry.shape
            if entry.dtype != "F32":
                text = f"'{name}' is {entry.dtype}, expected F32."
                fix = "the scale becomes F32", Edit(form={name: Form("F32", shape)})
                yield Fault("scale-dtype", name, text, _SCALED_MM, fatal=False), "warning", fix
            elif shape != entry.shape:
                text = f"'{name}' has shape {list(entry.shape)}, expected a scalar."
                fix = "the scale becomes a scalar", Edit(form={name: Form("F32", shape)})
                yield Fault("scale-dimensions", name, text, "ComfyUI takes it.", fatal=False), "note", fix


def mixture(scan: Scan) -> Iterator[Found]:
    """More than one way of quantizing in one file."""
    counts = Counter(layer.scheme for layer in scan.layers.values())
    if len(counts) > 1:
        titles = {layer.scheme: scan.scheme(layer).title for layer in scan.layers.values()}
        text = "the file mixes " + ", ".join(f"{titles[s]} ({n} layers)" for s, n in counts.most_common()) + "."
        yield (
            Fault("mixed-schemes", "", text, "Each loader takes its own and misreads the others.", False),
            "note",
            None,
        )


def metadata_format(file: ModelFile) -> Iterator[Found]:
    """`format` in the metadata, which tells for what framework a file is."""
    if file.metadata and "format" not in file.metadata:
        text = "the metadata have no 'format'."
        effect = "transformers before 5 refuses the file; diffusers and ComfyUI do not look at it."
        fix = 'the metadata get {"format": "pt"}', Edit(metadata={"format": "pt"})
        yield Fault("metadata-format", "", text, effect, fatal=False), "note", fix
