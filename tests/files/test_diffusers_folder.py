"""Folders of a component, opened by the loaders that they are for; as far as those run without a GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert, describe
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.rules import Rule
from quantwire.quantizers.weight import QuantizedWeight
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    **{"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128},
    **{"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True},
    "axes_dims_rope": (16, 56, 56),
}
LINEAR1 = "single_blocks.0.linear1.weight"


class Bar:
    def update(self, n: int, /) -> None:
        pass


def run(source: Path, target: Path, kind: str, **options: Any) -> Any:
    return convert(Request(source, target, kind, threads=1, **options), lambda total: nullcontext(Bar()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`transformer`: FLUX as diffusers saves it; `flux.safetensors`: the same in ComfyUI's layout."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flux")
    FluxTransformer2DModel(**SIZES).to(torch.bfloat16).save_pretrained(folder / "transformer")
    run(folder / "transformer", folder / "flux.safetensors", "BF16")
    return folder


def quantized(folder: Path) -> dict[str, QuantizedWeight]:
    found = scan(open_model(folder))
    assert not [f for f in found.faults if f.fatal]
    read = {name: found.read(name) for name in found.layers}
    return {name: value for name, value in read.items() if isinstance(value, QuantizedWeight)}


def restored(weight: QuantizedWeight) -> Tensor:
    return get_quantizer(weight.format_id).dequantize(weight, torch.bfloat16)


def need(format_id: str) -> None:
    if not availability(format_id).works:
        pytest.skip(availability(format_id).reason)


def test_comfyui_flux_comes_back_as_diffusers_has_it(made: Path, tmp_path: Path) -> None:
    """Cut by rows and swapped back: every matrix is the one that was saved."""
    from safetensors.torch import load_file

    need("torchao-int8wo")
    original = load_file(made / "transformer" / "diffusion_pytorch_model.safetensors")
    run(made / "flux.safetensors", tmp_path / "out", "torchao-int8wo", exclude=("*single*", "*.attn.*"))
    plain = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert set(original) - set(plain) == set(quantized(tmp_path / "out"))
    for name in set(original) & set(plain):
        assert torch.equal(plain[name], original[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((made / "transformer" / "config.json").read_text())
    assert {k: config[k] for k in SIZES} == {k: theirs[k] for k in SIZES}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["transformer", "flux.safetensors"])
@pytest.mark.parametrize("kind", ["torchao-int8wo", "sdnq-uint4", "sdnq-int8", "quanto-qint8"])
def test_diffusers_loads_the_folder(made: Path, tmp_path: Path, kind: str, source: str) -> None:
    """The values of every layer, as the library restores them, are those that were written."""
    from diffusers import FluxTransformer2DModel

    need(kind)
    out = tmp_path / "out"
    run(made / source, out, kind)
    weights = quantized(out)
    assert len(weights) > 20
    if kind.startswith("quanto"):
        from optimum.quanto import QuantizedDiffusersModel

        class Quantized(QuantizedDiffusersModel):  # type: ignore[misc]
            base_class = FluxTransformer2DModel

        model: Any = Quantized.from_pretrained(out)._wrapped
    else:
        # sdnq's scales are float32, and diffusers casts them to what the model is to be in.
        dtype = torch.float32 if kind.startswith("sdnq") else torch.bfloat16
        model = FluxTransformer2DModel.from_pretrained(out, torch_dtype=dtype)
    for name, weight in weights.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(_values(layer), restored(weight)), name
    others = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    plain = scan(open_model(out))
    for name, parameter in others.items():
        assert torch.equal(parameter.data.float(), plain.read(name).float()), name  # type: ignore[union-attr]


def _values(layer: nn.Module) -> Tensor:
    held: Any = layer
    if hasattr(held, "sdnq_dequantizer"):
        parts = {n: getattr(held, n, None) for n in ("weight", "scale", "zero_point", "svd_up", "svd_down")}
        return held.sdnq_dequantizer(**parts, dtype=torch.bfloat16, skip_compile=True)
    return held.weight.dequantize()


@pytest.mark.slow
def test_sdnq_loads_the_folder_itself(made: Path, tmp_path: Path) -> None:
    """With layers of several kinds, one of them with low-rank factors."""
    need("sdnq-uint4")
    from sdnq.loader import load_sdnq_model

    rules = (Rule("transformer_blocks.0.attn", "sdnq;type=int6;use-svd=true;svd-rank=4"),)
    run(made / "flux.safetensors", tmp_path / "out", "sdnq-uint4", rules=rules)
    model = load_sdnq_model(str(tmp_path / "out"), dtype=torch.bfloat16)
    weights = quantized(tmp_path / "out")
    assert {w.format_id for w in weights.values()} == {"sdnq-uint4", "sdnq-int6"}
    for name, weight in weights.items():
        assert torch.equal(_values(model.get_submodule(name.removesuffix(".weight"))), restored(weight)), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8"])
def test_the_configuration_of_bitsandbytes_skips_what_is_plain(made: Path, tmp_path: Path, kind: str) -> None:
    """diffusers loads these on a GPU only. Here its own configuration decides which layers it would replace."""
    from accelerate import init_empty_weights
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    need(kind)
    run(made / "flux.safetensors", tmp_path / "out", kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    read = BitsAndBytesConfig.from_dict(config)
    assert read.quantization_method() == ("nf4" if kind == "bnb-nf4" else "llm_int8")
    with init_empty_weights():
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(tmp_path / "out"))
    replace_with_bnb_linear(model, read.llm_int8_skip_modules, quantization_config=read)
    replaced = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert replaced == {name.removesuffix(".weight") for name in quantized(tmp_path / "out")}


@pytest.mark.slow
def test_a_folder_of_bitsandbytes_becomes_one_file_for_comfyui(made: Path, tmp_path: Path) -> None:
    """Rows of q, k, v and the rest are joined as they are: nothing is quantized again."""
    need("bnb-nf4")
    run(made / "transformer", tmp_path / "folder", "bnb-nf4")
    report = run(tmp_path / "folder", tmp_path / "one.safetensors", "bnb-nf4")
    one, parts = quantized(tmp_path / "one.safetensors"), quantized(tmp_path / "folder")
    names = [f"single_transformer_blocks.0.{n}.weight" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(restored(one[LINEAR1]), torch.cat([restored(parts[n]) for n in names]))
    assert {e.action for e in report.entries if e.name in one} == {"copy"}
    again = run(tmp_path / "one.safetensors", tmp_path / "again", "bnb-nf4")
    kept = {"proj_out.weight"}  # plain in ComfyUI's layout, where it can be told from that of the blocks
    assert {e.action for e in again.entries if e.name in set(parts) - kept} == {"copy"}
    for name in set(parts) - kept:
        weight = quantized(tmp_path / "again")[name]
        assert all(torch.equal(weight.tensors[n], t) for n, t in parts[name].tensors.items()), name


def test_what_cannot_be_a_folder_is_refused(made: Path, tmp_path: Path) -> None:
    source = made / "flux.safetensors"
    with pytest.raises(SpecError, match=r"do not read the layout comfy\.\nChoose a format of bnb"):
        describe(Request(source, tmp_path / "out", "comfy-int8"))
    with pytest.raises(SpecError, match=r"^A folder takes quantized formats such as bnb-nf4, and BF16 is none"):
        describe(Request(source, tmp_path / "out", "BF16"))
    need("bnb-nf4")
    rules = (Rule("double_blocks.0", "bnb-int8"), Rule("transformer_blocks.0", "bnb-int8"))
    with pytest.raises(SpecError, match="one format of bitsandbytes a folder, got bnb-int8, bnb-nf4"):
        describe(Request(source, tmp_path / "out", "bnb-nf4", rules=rules[1:]))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"config\.json: is there already"):
        run(source, tmp_path / "out", "bnb-nf4")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]
