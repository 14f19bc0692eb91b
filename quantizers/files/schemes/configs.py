"""Where the libraries write how a model was quantized: the folder's JSON files, or strings of the file itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from ..model_file import ModelFile

KEY = "quantization_config"


def as_object(text: str | None) -> Mapping[str, Any]:
    """A string of JSON as an object; empty where it is none."""
    try:
        value: object = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return {}
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def quantization_config(file: ModelFile, method: str) -> Mapping[str, Any]:
    """The settings of one library: `quantization_config` of `config.json` or of the file's metadata, or
    `quantization_config.json`; empty where none of them is of `method`.

    Args:
        method: `quant_method`.
    """
    places: list[object] = [
        file.configs.get("config.json", {}).get(KEY),
        file.configs.get(f"{KEY}.json"),
        as_object(file.metadata.get(KEY)),
        as_object(file.metadata.get("config")).get(KEY),
    ]
    for place in places:
        if isinstance(place, Mapping):
            found = cast("Mapping[str, Any]", place)
            if found.get("quant_method") == method:
                return found
    return {}
