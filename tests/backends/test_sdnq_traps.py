"""What sdnq itself does that would mislead or break, and that it does not here.

Each test of a trap first shows it on the library, so that a version without it is noticed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.subject import relative
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.backends.sdnq.library import library
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.formats.sdnq import BACKEND, SHORT_NAMES, TYPES, library_name
from quantwire.quantizers.kernels.expand import dequantized
from quantwire.quantizers.registry import format_ids, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight, TensorMeta
from torch import Tensor, nn

SITE = Path(sysconfig.get_paths()["purelib"])


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantize(uri: str, w: Tensor) -> QuantizedWeight:
    return quantize_tensor("w", w, QuantSpec.from_uri(uri))[0]


def refusal(uri: str, shape: tuple[int, ...] = (64, 256)) -> str | None:
    spec = QuantSpec.from_uri(uri)
    return get_quantizer(spec.format_id).refuse(spec, TensorMeta("w.weight", shape, torch.bfloat16))


def predicted(uri: str, shape: tuple[int, ...] = (64, 256)) -> int:
    spec = QuantSpec.from_uri(uri)
    return get_quantizer(spec.format_id).predict_nbytes(spec, TensorMeta("w.weight", shape, torch.bfloat16))


def sqnr_db(w: Tensor, restored: Tensor) -> float:
    return float(10 * torch.log10(w.square().sum() / (w - restored).square().sum()))


@pytest.fixture(scope="module")
def sdnq() -> Any:
    """The library as the backend imports it; a plain import would compile for 18 s."""
    if importlib.util.find_spec("sdnq") is None:
        pytest.skip("sdnq is not installed")
    return library()


def run(code: str, *flags: str, **env: str) -> Any:
    """Run code in a process of its own; what it prints last is JSON."""
    clean = {name: v for name, v in os.environ.items() if not name.startswith("SDNQ_")} | env
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# Names of weight types


def test_a_bad_weight_type_is_a_bare_key_error_in_the_library(sdnq: Any) -> None:
    with pytest.raises(KeyError, match=r"^'uint17'$"):
        sdnq.SDNQConfig(weights_dtype="uint17")


def test_a_bad_weight_type_is_refused_by_name() -> None:
    with pytest.raises(SpecError) as failure:
        QuantSpec.from_uri("sdnq;type=uint17")
    first, second = str(failure.value).splitlines()
    assert first.startswith("sdnq: argument 'type' must be a weight type such as int8 or uint4, got 'uint17'. Did you")
    assert second.startswith("Types: int8, uint8, ")
    assert set(second.removeprefix("Types: ").rstrip(".").replace(". Also: ", ", ").split(", ")) == set(TYPES)


@pytest.mark.parametrize(
    ("text", "format_id"),
    [
        ("uint7", "sdnq-uint7"),
        ("float8-e4m3fn", "sdnq-float8-e4m3fn"),
        ("float8_e4m3fn", "sdnq-float8-e4m3fn"),
        ("fp4", "sdnq-float4-e2m1fn"),
    ],
)
def test_types_by_the_librarys_names_and_ours(text: str, format_id: str) -> None:
    spec = QuantSpec.from_uri(f"sdnq;type={text}")
    assert spec.format_id == format_id
    assert QuantSpec.from_uri(spec.to_uri()) == spec


def test_short_names_are_those_of_the_library(sdnq: Any) -> None:
    known = sdnq.common.dtype_dict
    for short, weight_type in SHORT_NAMES.items():
        assert known[short] is known[weight_type.replace("-", "_")], short


def precision(facts: dict[str, Any]) -> float:
    """The dB that a type must reach on normally distributed values: 6 for each bit that divides a range evenly."""
    if facts["is_integer"]:
        return 6.0 * facts["num_bits"] - 8
    return 6.0 * (facts["mantissa"] + facts["sign"])


def test_every_type_that_keeps_its_promise_is_offered_and_no_other(sdnq: Any) -> None:
    """A type keeps it if it reaches its precision in as many bits as it names, and twice in a row."""
    w = values(64, 256)
    offered = {library_name(f"sdnq-{t}") for t in TYPES}
    known = sdnq.common.dtype_dict
    canonical = {id(facts): name for name, facts in reversed(known.items())}  # the first name of each
    assert offered <= set(canonical.values())
    for name in canonical.values():
        dequantizer, tensors = sdnq.quantizer.sdnq_quantize_layer_weight(
            w.clone(), layer_class_name="Linear", weights_dtype=name
        )
        kept = [dequantizer(**tensors, dtype=torch.float32, skip_compile=True) for _ in range(2)]
        exact = all(sqnr_db(w, restored) >= precision(known[name]) for restored in kept)
        small = tensors["weight"].nbytes * 8 == w.numel() * known[name]["num_bits"]
        assert (exact and small) == (name in offered), (name, sqnr_db(w, kept[0]), tensors["weight"].dtype)


def test_listed_types_are_twelve() -> None:
    assert len([f for f in format_ids() if f.startswith("sdnq-")]) == 12
    assert len(BACKEND.entries) == len(TYPES) == len(set(TYPES))


# Import

SNAPSHOT = """
import json, os, sys, warnings, logging
import torch
import torch._dynamo.config as dynamo, torch._inductor.config as inductor

def flags():
    found = {
        "matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": torch.is_grad_enabled(),
        "random state": torch.get_rng_state().tolist(),
        "root logger": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "environment": dict(os.environ),
        "dynamo": {k: str(v) for k, v in dynamo.get_config_copy().items()},
        "inductor": {k: str(v) for k, v in inductor.get_config_copy().items()},
    }
    for place in ("cuda", "cuda.matmul", "cudnn", "mkldnn", "mkl", "mps", "quantized", "opt_einsum"):
        module = torch.backends
        for part in place.split("."):
            module = getattr(module, part)
        names = ["allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"]
        for name in {*dir(module), *names}:
            try:
                value = getattr(module, name)
            except Exception:
                continue
            if isinstance(value, (bool, int, float, str)) and not name.startswith("__"):
                found[place + "." + name] = value
    return found

before = flags()
IMPORT
after = flags()
changed = {k: [str(before.get(k))[:300], str(after.get(k))[:300]]
           for k in {*before, *after} if before.get(k) != after.get(k)}
print(json.dumps([changed, "sdnq" in sys.modules, sys.modules["sdnq.common"].use_torch_compile]))
"""
OURS = """
from quantwire.quantizers.backends.sdnq.library import library
library()
"""


@pytest.mark.slow
def test_our_import_leaves_global_settings_alone(sdnq: Any) -> None:
    changed, imported, compiling = run(SNAPSHOT.replace("IMPORT", OURS))
    assert imported
    assert not compiling
    assert changed == {}


@pytest.mark.slow
def test_the_users_own_choice_to_compile_is_kept(sdnq: Any) -> None:
    # SDNQ_USE_TORCH_COMPILE=1 skips the library's trial compilation, which takes 18 s, and says yes.
    changed, imported, compiling = run(SNAPSHOT.replace("IMPORT", OURS), SDNQ_USE_TORCH_COMPILE="1")
    assert imported
    assert compiling
    assert list(changed) == ["dynamo"]  # and this is what it costs: recompile limits


def test_asking_about_formats_does_not_import_the_library() -> None:
    code = """
import json, sys
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import TensorMeta
import torch
spec = QuantSpec.from_uri("sdnq;type=uint4;group-size=32")
reason = get_quantizer(spec.format_id).refuse(spec, TensorMeta("w", (3, 33), torch.float32))
print(json.dumps([reason, "sdnq" in sys.modules]))
"""
    reason, imported = run(code)
    assert reason == "N=3 by K=33 is 99 values, no multiple of the 2 that uint4 packs together"
    assert not imported


# A machine without sdnq


def without_sdnq(folder: Path) -> str:
    """A folder of packages like this environment's, but without sdnq; code that makes a bare interpreter use it."""
    for entry in SITE.iterdir():
        if not entry.name.startswith("sdnq"):
            (folder / entry.name).symlink_to(entry)
    return f"import site; site.addsitedir({str(folder)!r})\n"


def test_without_the_library_there_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    code = """
import importlib.util, json
assert importlib.util.find_spec("torch") and not importlib.util.find_spec("sdnq")
import torch
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import BackendUnavailable
from quantwire.quantizers.registry import availability, format_ids
from quantwire.quantizers.spec import QuantSpec
states = [availability(f) for f in format_ids() if f.startswith("sdnq-")]
try:
    quantize_tensor("w", torch.ones(64, 64), QuantSpec.from_uri("sdnq;type=uint4"))
except BackendUnavailable as err:
    message = str(err)
print(json.dumps([[s.works, s.reason, s.remedy] for s in states] + [message]))
"""
    *states, message = run(without_sdnq(tmp_path) + code, "-I", "-S")
    assert len(states) == 12
    for works, reason, remedy in states:
        assert not works
        assert reason == "sdnq is not installed."
        assert remedy.startswith(
            "Run `pip install sdnq` (its licence is GPL-3.0-only, so installing it is your choice), or "
        )
    assert message.splitlines()[0] == "sdnq-uint4: sdnq is not installed."


# Sizes


@pytest.mark.parametrize("shape", [(64, 256), (3072, 3072), (640, 320)], ids=str)
def test_two_bits_are_larger_than_four(sdnq: Any, shape: tuple[int, int]) -> None:
    """By the automatic rule 2-bit values share a scale and a zero point of 8 bytes by 16, 4-bit ones by 64."""
    two, four = predicted("sdnq-uint2", shape), predicted("sdnq-uint4", shape)
    assert two > four
    count = shape[0] * shape[1]
    assert (two, four) == (count // 4 + count // 16 * 8, count // 2 + count // 64 * 8)
    assert predicted("sdnq;type=uint2;group-size=64", shape) < four
    w = values(*shape, dtype=torch.bfloat16)
    assert (quantize("sdnq-uint2", w).nbytes, quantize("sdnq-uint4", w).nbytes) == (two, four)


@pytest.mark.parametrize(("given", "taken"), [(32, 32), (48, 64), (100, -1), (160, -1), (1000, -1), (-1, -1), (0, 64)])
def test_group_size_that_does_not_divide_k_is_the_librarys_next(sdnq: Any, given: int, taken: int) -> None:
    q = quantize(f"sdnq;type=uint4;group-size={given}", values(32, 256))
    assert q.meta["group_size"] == taken
    assert q.nbytes == predicted(f"sdnq;type=uint4;group-size={given}", (32, 256))


# Options that would do nothing, or nothing good


@pytest.mark.parametrize(
    ("uri", "shape", "reason"),
    [
        ("sdnq;type=uint4;svd-rank=8", (64, 256), "option svd-rank does nothing without use-svd=true"),
        ("sdnq;svd-steps=2", (64, 256), "option svd-steps does nothing without use-svd=true"),
        ("sdnq;dynamic-threshold=0.1", (64, 256), "option dynamic-threshold does nothing without dynamic=true"),
        (
            "sdnq;use-svd=true",
            (32, 1024),
            "svd-rank 32: its factors alone are as large as the weight of N=32 by K=1024",
        ),
        ("sdnq;use-hadamard=true", (64, 34), "K=34 is not a multiple of 4, the smallest Hadamard rotation"),
        (
            "sdnq;dynamic=true",
            (3, 34),
            "N=3 by K=34 is 102 values, no multiple of the 16 that the packed types that dynamic may choose packs "
            "together",
        ),
    ],
)
def test_options_in_vain_are_refused(uri: str, shape: tuple[int, int], reason: str) -> None:
    assert refusal(uri, shape) == reason


def test_the_library_drops_hadamard_without_a_word(sdnq: Any) -> None:
    dequantizer, _ = sdnq.quantizer.sdnq_quantize_layer_weight(
        values(16, 34), layer_class_name="Linear", weights_dtype="int8", use_hadamard=True
    )
    assert not dequantizer.use_hadamard


# The quantized product


def test_quantized_matmul_of_bfloat16_storage_is_refused_since_it_overflows(sdnq: Any) -> None:
    reason = refusal("sdnq;type=bfloat16;quantized-matmul=true")
    assert reason == "sdnq multiplies bfloat16 storage as float16, which overflows; leave quantized-matmul out"
    linear = nn.Linear(256, 64, bias=False).requires_grad_(False)
    config = sdnq.SDNQConfig(weights_dtype="bfloat16", use_quantized_matmul=True)
    layer, _ = sdnq.sdnq_quantize_layer(linear, config)
    assert not torch.isfinite(layer(values(40, 256))).all()


@pytest.mark.parametrize(
    ("shape", "tokens", "name", "reason"),
    [
        ((64, 256), 32, "sdnq int8 matmul", "the library's own product, by quantized-matmul"),
        ((64, 256), 31, "dequantize, F.linear", "31 tokens: sdnq multiplies in quantized form from 32 up"),
        (
            (33, 64),
            64,
            "expand in blocks, F.linear",
            "N=33, K=64: sdnq's quantized product needs N and K to be multiples of 16 and at least 32",
        ),
    ],
)
def test_quantized_matmul_says_what_runs(
    sdnq: Any, shape: tuple[int, int], tokens: int, name: str, reason: str
) -> None:
    q = quantize("sdnq;quantized-matmul=true", values(*shape))
    kernel = get_quantizer(q.format_id).kernel(q, torch.device("cpu"), torch.float32, tokens)
    assert (kernel.name, kernel.reason) == (name, reason)
    x = values(tokens, shape[1], seed=1)
    exact = nn.functional.linear(x, get_quantizer(q.format_id).dequantize(q, torch.float32))
    # Quantized activations cost 0.5 to 1 %; where they are not quantized the product is that of the weight.
    assert torch.equal(QuantizedLinear(q, None)(x), exact) == ("sdnq" not in name)


@pytest.mark.parametrize(
    "weight_type", ["uint8", "int6", "uint4", "float8-e4m3fn", "float4-e2m1fn", "float16", "int16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_matmul_of_other_types(sdnq: Any, weight_type: str, dtype: torch.dtype) -> None:
    q = quantize(f"sdnq;type={weight_type};quantized-matmul=true", values(64, 256, dtype=dtype))
    bias, x = values(64, seed=1, dtype=dtype), values(2, 40, 256, seed=2, dtype=dtype)
    before = {name: t.clone() for name, t in q.tensors.items()}
    got = QuantizedLinear(q, bias)(x)
    assert torch.equal(got, get_quantizer(q.format_id).to_native(q, bias)(x))
    assert all(torch.equal(q.tensors[name], t) for name, t in before.items())
    restored = get_quantizer(q.format_id).dequantize(q, torch.float32)
    expected = nn.functional.linear(x.float(), restored, bias.float())
    error = float((got.float() - expected).norm() / expected.norm())
    assert error < (0.05 if "float" in weight_type else 0.02)


# SVD and dynamic


def test_svd_gives_the_same_bytes_and_leaves_the_random_state(sdnq: Any) -> None:
    w = values(64, 256)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = quantize("sdnq;type=uint4;use-svd=true", w)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = quantize("sdnq;type=uint4;use-svd=true", w)
    assert all(torch.equal(second.tensors[name], t) for name, t in first.tensors.items())


@pytest.mark.parametrize("matmul", ["false", "true"], ids=lambda v: f"matmul-{v}")
@pytest.mark.parametrize("svd", ["", ";use-svd=true;use-hadamard=true"], ids=["plain", "svd-hadamard"])
def test_dynamic_takes_the_librarys_choice(sdnq: Any, svd: str, matmul: str) -> None:
    w = values(64, 256)
    w[:, ::16] *= 30  # outliers, so that the first type is not good enough
    q = quantize(f"sdnq;type=uint4;dynamic=true;quantized-matmul={matmul}{svd}", w)
    linear = nn.Linear(256, 64, bias=False).requires_grad_(False)
    linear.load_state_dict({"weight": w})
    config = sdnq.SDNQConfig(
        weights_dtype="uint4",
        use_dynamic_quantization=True,
        use_quantized_matmul=matmul == "true",
        use_svd=bool(svd),
        use_hadamard=bool(svd),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, _ = sdnq.sdnq_quantize_layer(linear, config)
    chosen = layer.sdnq_dequantizer
    assert q.meta["weights_dtype"] == chosen.weights_dtype
    assert bool(svd) or chosen.weights_dtype != "uint4"
    assert torch.equal(q.tensors["qdata"], layer.weight)
    restored = get_quantizer(q.format_id).dequantize(q, torch.float32)
    expected = chosen(**sdnq.utils.get_sdnq_params(layer), skip_quantized_matmul=chosen.use_quantized_matmul)
    assert torch.equal(restored, expected)
    x = values(40, 256, seed=1)
    assert torch.equal(QuantizedLinear(q, None)(x), layer(x))
    assert sqnr_db(w, restored) >= 20  # 0.01, the library's threshold for 4 bits


def test_dynamic_without_a_good_enough_type_is_an_error_and_not_full_precision(sdnq: Any) -> None:
    with pytest.raises(SpecError, match=r"^sdnq-int4: no weight type of up to 16 bits loses as little as dynamic-thre"):
        quantize("sdnq;type=int4;dynamic=true;dynamic-threshold=1e-12", values(64, 256))


# The native layer


def test_native_float8_takes_its_own_values_back_and_no_others(sdnq: Any) -> None:
    q = quantize("sdnq-float8-e4m3fn", values(64, 256))
    layer = get_quantizer(q.format_id).to_native(q, None)
    layer.load_state_dict(layer.state_dict())
    for foreign in (values(64, 256), values(64, 256).to(torch.float8_e4m3fn)):  # without scales: a plain cast
        with pytest.raises(WeightError, match="is already quantized; the result would be noise"):
            layer.load_state_dict({"weight": foreign}, strict=False)


def test_every_type_expands_as_the_library_dequantizes(sdnq: Any) -> None:
    """Float types of 8 bits lie in uint8 too, but are no integers."""
    w = values(32, 256) * 0.02
    expanded = 0
    for name in TYPES:
        quantizer = get_quantizer(f"sdnq-{name}")
        q = quantizer.quantize(w, QuantSpec(f"sdnq-{name}"))
        form = quantizer.form(q)
        if form is not None:
            expanded += 1
            assert relative(dequantized(form, torch.float32), quantizer.dequantize(q, torch.float32)) < 1e-6, name
        assert relative(QuantizedLinear(q, None)(values(40, 256)), nn.functional.linear(values(40, 256), w)) < 0.7, name
    assert expanded >= 10


def test_dynamic_weights_multiply_as_what_they_became(sdnq: Any) -> None:
    w = values(64, 256) * 0.02
    for start in ("float8-e4m3fn", "uint4", "int8"):
        q = quantize(f"sdnq;type={start};dynamic=true", w)
        x = values(40, 256, seed=2)
        expected = nn.functional.linear(x, get_quantizer(q.format_id).dequantize(q, torch.float32))
        assert relative(QuantizedLinear(q, None)(x), expected) < 1e-5, q.meta["weights_dtype"]
