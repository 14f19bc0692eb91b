"""RecordImatrix, SaveImatrix and SaveCalibration: what the inputs of layers are like in the run of a graph."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.errors import WorkflowError
from .common import CATEGORY

ADD, REPLACE = "add to it", "replace it"


class RecordImatrix:
    DESCRIPTION = (
        "Records how large the inputs of each linear layer are while a model samples: an importance matrix, with which "
        "GGUF files of few bits come out better, and activation scales for fp8 and nvfp4 files. Sample with the model "
        "that comes out, and save with SaveImatrix or SaveCalibration. Not with torch.compile on the model."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "IMATRIX")
    RETURN_NAMES = ("model", "imatrix")
    OUTPUT_TOOLTIPS = ("The model, to sample with.", "What is recorded, for SaveImatrix and SaveCalibration.")
    FUNCTION = "record"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "The model to record, best at full precision; it is not changed."
        return {"required": {"model": ("MODEL", {"tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        # Always anew: a cached recording would go on from an earlier run, and cached samples would record nothing.
        return float("nan")

    def record(self, model: Any) -> tuple[Any, Any]:
        return current().record(model)


class SaveImatrix:
    DESCRIPTION = (
        "Writes what RecordImatrix recorded into a GGUF file, as llama.cpp's tools write and read it, for "
        "quantwire convert --imatrix."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_TOOLTIPS = ("Where the file is.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        name = "File in the output folder; .gguf is added, and folders are made."
        exists = (
            "If the file is there. add to it: several runs make one matrix, as they should. replace it: start again."
        )
        return _inputs("imatrix/model", name, exists)

    def save(self, imatrix: Any, after: Any, filename: str, if_exists: str = ADD) -> dict[str, Any]:
        from ..hosts.record import describe
        from ..quantizers.files.imatrix import merge, read_imatrix, write_imatrix

        recorded = imatrix.matrix("workflow")
        if not recorded.entries:
            raise _nothing()
        path = current().output_path(filename.removesuffix(".gguf") + ".gguf")
        # Read to be replaced, too: anything else than an importance matrix, such as a model, is refused.
        there = [read_imatrix(path)] if path.exists() else []
        matrix = merge([*there, recorded] if if_exists == ADD else [recorded])
        write_imatrix(path, matrix)
        text = f"{describe(recorded, sorted(imatrix.idle))}\n{path}: {matrix.chunk_count} model calls in all"
        current().show_text(text)
        return {"ui": {"text": (text,)}, "result": (str(path),)}


class SaveCalibration:
    DESCRIPTION = (
        "Writes the largest inputs of each layer that RecordImatrix saw into a JSON file, for quantwire convert "
        "--scales: fp8 and nvfp4 files then have an input_scale, and ComfyUI need not look for the largest value of "
        "each input."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_TOOLTIPS = ("Where the file is.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        name = "File in the output folder; .json is added, and folders are made."
        exists = "If the file is there. add to it: the larger values of both are kept. replace it: start again."
        return _inputs("calibration/model", name, exists)

    def save(self, imatrix: Any, after: Any, filename: str, if_exists: str = ADD) -> dict[str, Any]:
        from ..quantizers.files.calibration import describe, merge, read_calibration, write_calibration

        recorded = imatrix.calibration("workflow")
        if not recorded.layers:
            raise _nothing()
        path = current().output_path(filename.removesuffix(".json") + ".json")
        # Read to be replaced, too: any other file is refused.
        there = [read_calibration(path)] if path.exists() else []
        whole = merge([*there, recorded] if if_exists == ADD else [recorded])
        write_calibration(path, whole)
        text = f"{describe(recorded, sorted(imatrix.idle))}\n{path}: {whole.calls} model calls in all"
        current().show_text(text)
        return {"ui": {"text": (text,)}, "result": (str(path),)}


def _inputs(default: str, name: str, exists: str) -> dict[str, Any]:
    return {
        "required": {
            "imatrix": ("IMATRIX", {"tooltip": "From RecordImatrix."}),
            "after": ("LATENT", {"tooltip": "From the last sampler that records: saving waits for it."}),
            "filename": ("STRING", {"default": default, "tooltip": name}),
            "if_exists": ([ADD, REPLACE], {"default": ADD, "tooltip": exists}),
        }
    }


def _nothing() -> WorkflowError:
    return WorkflowError(
        "Nothing was recorded: no sampler ran with the model that RecordImatrix gives.\n"
        "Link that model to the sampler, and the sampler's latent to `after`."
    )
