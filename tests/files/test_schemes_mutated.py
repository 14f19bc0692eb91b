"""Headers that contradict themselves in every way: the schemes name faults and layers, and never raise."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from damaged_files import write
from quantwire.quantizers.files.model_file import Entry, ModelFile, open_model
from quantwire.quantizers.files.schemes.scan import scan

DTYPES = ("F32", "F16", "BF16", "U8", "I8", "I32", "I64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL")
SIZES = (0, 1, 2, 3, 7, 16, 32, 48, 64, 128, 1 << 40)
ROUNDS = 800
N, K = 32, 64
HOOK = "__nncf_hooks.post_hooks.a:weight__0.0"
AO = {"_type": "Int8Tensor", "_data": {"block_size": [1, K], "dtype": {"_data": "bfloat16"}}}
SDNQ = {"quant_method": "sdnq", "weights_dtype": "uint4", "modules_dtype_dict": {"int8": ["b"]}}
CT = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}}
# Name -> tensors (dtype, shape), metadata, config.
FILES: dict[str, tuple[dict[str, tuple[Any, ...]], dict[str, str], dict[str, Any]]] = {
    "quanto": (
        {
            **{"a.weight._data": ("I8", [N, K]), "a.weight._scale": ("BF16", [N, 1]), "a.input_scale": ("BF16", [])},
            **{"b.weight._data._data": ("U8", [N // 2, K]), "b.weight._scale": ("BF16", [N, 1])},
            **{"b.weight._shift": ("BF16", [N, 1]), "b.bias": ("BF16", [N])},
        },
        {"quanto_qmap.json": json.dumps({"b": {"weights": "qint4", "shape": [N, K]}})},
        {},
    ),
    "torchao": (
        {
            **{"a._weight_qdata": ("I8", [N, K]), "a._weight_scale": ("F32", [N, 1])},
            **{"a._weight_zero_point": ("I8", [N, 1]), "b._weight_qdata": ("U8", [N, K // 2])},
            **{"b._weight_scale": ("BF16", [2, N]), "b._weight_zero_point": ("BF16", [2, N])},
            **{"c._weight_qdata": ("U8", [N, K // 2]), "c._weight_scale": ("F8_E4M3", [128, 4])},
        },
        {
            "a.weight": json.dumps(AO),
            "b.weight": json.dumps(AO | {"_type": "Int4Tensor"}),
            "c.weight": json.dumps({"_type": "NVFP4Tensor", "_data": {"is_swizzled_scales": True, "block_size": 16}}),
        },
        {},
    ),
    "sdnq": (
        {
            **{"a.weight": ("U8", [N * K // 2]), "a.scale": ("F32", [N, 1]), "a.zero_point": ("F32", [N, 1])},
            **{"b.weight": ("I8", [N, K]), "b.scale": ("F32", [N, 1]), "b.bias": ("BF16", [N])},
        },
        {},
        {"quantization_config": SDNQ},
    ),
    "nncf": (
        {
            **{"a.weight": ("U8", [N * K // 2, 1]), f"{HOOK}._scale": ("F16", [N, 2, 1])},
            f"{HOOK}._zero_point": ("U8", [N, 1]),
        },
        {},
        {},
    ),
    "compressed": (
        {
            **{"a.weight": ("I8", [N, K]), "a.weight_scale": ("BF16", [N, 1]), "b.weight_packed": ("I32", [N, K // 8])},
            **{"b.weight_scale": ("BF16", [N, 2]), "b.weight_shape": ("I32", [2]), "c.weight_packed": ("U8", [N, 32])},
            **{"c.weight_scale": ("F8_E4M3", [N, 4]), "c.weight_global_scale": ("F32", [1])},
        },
        {},
        {"quantization_config": CT},
    ),
    "named": (
        {
            **{"a.qweight": ("I32", [K // 8, N]), "a.qzeros": ("I32", [2, N // 8]), "a.scales": ("F16", [2, N])},
            **{"b.qweight": ("I8", [N, K // 2]), "b.wscales": ("BF16", [1, N]), "b.proj_up": ("BF16", [N, 16])},
        },
        {"quantization_config": json.dumps({"weight": {"dtype": "int4"}})},
        {},
    ),
}


def mutated(file: ModelFile, rng: random.Random) -> ModelFile:
    """A few entries with another dtype or shape, without, or under another's name; and settings of other kinds."""
    entries = dict(file.entries)
    for name in rng.sample(sorted(entries), rng.randint(1, 3)):
        if name not in entries:
            continue
        entry = entries.pop(name)
        how = rng.randrange(5)
        if how == 0:
            continue
        if how == 1:
            entry = dataclasses.replace(entry, dtype=rng.choice(DTYPES))
        elif how == 2:
            entry = dataclasses.replace(entry, shape=tuple(rng.choices(SIZES, k=rng.randint(0, 4))))
        elif how == 3:
            entry = _resized(entry, rng)
        else:
            name = rng.choice(sorted(file.entries))
        entries[name] = dataclasses.replace(entry, name=name)
    metadata = {key: _scrambled(value, rng) for key, value in file.metadata.items()}
    configs = {key: json.loads(_scrambled(json.dumps(value), rng)) for key, value in file.configs.items()}
    return dataclasses.replace(file, entries=entries, metadata=metadata, configs=configs)


def _resized(entry: Entry, rng: random.Random) -> Entry:
    if not entry.shape:
        return dataclasses.replace(entry, shape=(1,))
    shape = list(entry.shape)
    shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    return dataclasses.replace(entry, shape=tuple(shape))


def _scrambled(text: str, rng: random.Random) -> str:
    """JSON with one value replaced by one of another kind, now and then."""
    value = json.loads(text)
    if rng.random() < 0.5:
        return text
    place: Any = value
    while isinstance(place, dict) and place:
        key = rng.choice(sorted(place))
        if not isinstance(place[key], dict) or not place[key] or rng.random() < 0.2:
            place[key] = rng.choice([None, 7, -1, 1.5, "x", [], [None], {}, {"x": [1]}, True])
            break
        place = place[key]
    return json.dumps(value)


@pytest.mark.parametrize("name", list(FILES))
def test_scanning_never_raises(tmp_path: Path, name: str) -> None:
    tensors, metadata, config = FILES[name]
    write(tmp_path / "model.safetensors", tensors | {"plain.weight": ("BF16", [4, 4])}, metadata)
    (tmp_path / "config.json").write_text(json.dumps(config))
    sound = open_model(tmp_path)
    before = scan(sound)
    assert not before.faults or name == "compressed"  # whose small tensor holds no shape here
    assert before.plain[-1] == "plain.weight"
    rng = random.Random(name)
    different = 0
    for _ in range(ROUNDS):
        found = scan(mutated(sound, rng))
        assert found.shapes is not None
        different += found.layers != before.layers
        for layer in found.layers.values():
            assert layer.format_id or layer.why, layer
    assert different > ROUNDS / 2
