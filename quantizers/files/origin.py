"""Where a file says that it comes from: the program that wrote it, how it was trained, its title and licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

MAX_SHOWN = 200  # characters of a value; thumbnails and whole workflows stand in metadata too
# What the keys of metadata are called for people, in this order; several programs have the same thing.
_SHOWN = (
    ("title", ("modelspec.title", "general.name", "ss_output_name", "title", "name")),
    ("author", ("modelspec.author", "general.author", "general.organization", "author")),
    ("licence", ("modelspec.license", "general.license", "license")),
    ("architecture", ("modelspec.architecture", "general.architecture")),
    ("made on", ("modelspec.date", "general.date")),
    ("base model", ("ss_base_model_version", "ss_sd_model_name", "general.base_model.0.name")),
    ("adapter", ("ss_network_module", "networkType")),
    ("rank", ("ss_network_dim",)),
    ("alpha", ("ss_network_alpha",)),
    ("resolution", ("modelspec.resolution", "ss_resolution")),
    ("trained on images", ("ss_num_train_images",)),
    ("training steps", ("ss_steps", "ss_max_train_steps")),
    ("trigger words", ("modelspec.trigger_phrase", "ss_trigger_words")),
    ("prediction", ("modelspec.prediction_type",)),
    ("hash", ("modelspec.hash_sha256", "sshs_model_hash")),
)
OWN = "quantwire"
CONVERSION = "quantwire_conversion"
SAFETENSORS_LIBRARY = "the safetensors library"


def metadata_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of a file's metadata that people ask for."""
    found: dict[str, str] = {}
    for label, keys in _SHOWN:
        value = next((metadata[k] for k in keys if str(metadata.get(k, "")).strip() not in ("", "None")), None)
        if value is not None:
            found[label] = _short(value)
    found |= _conversion(metadata.get(CONVERSION, ""))
    # Of the pack's other keys all but the table of tensors, which is what the layers are shown from.
    return found | {k: _short(v) for k, v in metadata.items() if k.startswith(OWN) and k not in (OWN, CONVERSION)}


def _conversion(text: str) -> dict[str, str]:
    """What the pack wrote of a conversion: source with the hash of its header, spec URI, versions."""
    data = _object(text)
    source = data.get("source")
    if not isinstance(source, dict):
        return {}
    read = cast("dict[str, Any]", source)
    headers: object = read.get("headers")
    items = cast("list[Any]", headers) if isinstance(headers, list) else []
    hashes = [str(cast("dict[str, Any]", item).get("header", "")) for item in items if isinstance(item, dict)]
    found = {
        "made from": _short(f"{read.get('name', 'unknown')} (sha256 of its header: {', '.join(hashes) or 'unknown'})")
    }
    if isinstance(data.get("spec"), str):
        found["made as"] = _short(data["spec"])
    versions = data.get("versions")
    if isinstance(versions, dict) and OWN in versions:
        found["made by"] = f"{OWN} {cast('dict[str, Any]', versions)[OWN]}"
    return found


def _object(text: str) -> dict[str, Any]:
    """A JSON object, empty where the text is none."""
    try:
        value: object = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _short(value: str) -> str:
    return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}... ({len(value)} characters)"


def writers(metadata: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Programs that the file names, beside the library that its layout belongs to."""
    found: list[str] = []
    if any(key.startswith(OWN) for key in metadata):
        found.append(OWN)
    software = _software(metadata)
    if software:
        found.append(software)
    if any(key.startswith("ss_") for key in metadata):
        found.append("kohya's trainers (ss_ metadata)")
    config = configs.get("config.json", {})
    for key, name in (("_diffusers_version", "diffusers"), ("transformers_version", "transformers")):
        if isinstance(config.get(key), str):
            found.append(f"{name} {config[key]}")
    if metadata.get("general.quantized_by"):
        found.append(metadata["general.quantized_by"])
    if not found and metadata.get("format") in ("pt", "tf", "flax", "mlx"):
        found.append(f"{SAFETENSORS_LIBRARY} (format {metadata['format']})")
    return found


def _software(metadata: Mapping[str, str]) -> str:
    """`software` is a JSON object with name and version in files of ai-toolkit, and a name in others."""
    text = metadata.get("software", "")
    data = _object(text)
    named = " ".join(str(data[k]) for k in ("name", "version") if data.get(k))
    return (named or text.strip('"'))[:MAX_SHOWN]
