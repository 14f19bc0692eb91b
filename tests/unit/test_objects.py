"""Modules are found inside the objects of both hosts, of libraries, and of other packs; nothing is computed for it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import weakref
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from quantwire.hosts.objects import components_of
from quantwire.quantizers.compat.find import find_carriers
from quantwire.quantizers.errors import SpecError
from torch import nn

DIM = 8


def linear() -> nn.Module:
    return nn.Linear(DIM, DIM)


def clip_text() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": DIM, "intermediate_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=16, **sizes))


def t5() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=16, d_model=DIM, d_kv=DIM, d_ff=DIM, num_layers=1, num_heads=1)
    )


def vae() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(block_out_channels=(DIM,), norm_num_groups=1, latent_channels=4)


def flux_transformer() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=DIM,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        pooled_projection_dim=DIM,
        axes_dims_rope=(4, 2, 2),
    )


@pytest.fixture
def flux() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=None,
        text_encoder_2=t5(),
        tokenizer_2=None,
        transformer=flux_transformer(),
    )


FLUX_PARTS = {"transformer", "vae", "text_encoder", "text_encoder_2"}

# Pipelines


def test_a_diffusers_pipeline_has_its_modules_by_their_names(flux: Any) -> None:
    assert components_of(flux) == {name: getattr(flux, name) for name in FLUX_PARTS}


def test_another_diffusers_pipeline_with_parts_left_out() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(DIM,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=1,
        layers_per_block=1,
        cross_attention_dim=DIM,
        attention_head_dim=DIM,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    assert set(components_of(pipe)) == {"vae", "text_encoder", "unet"}


def test_a_transformers_pipeline() -> None:
    transformers = pytest.importorskip("transformers")
    model = clip_text()

    class Encode(transformers.Pipeline):
        def _sanitize_parameters(self, **kwargs: Any) -> Any:
            return {}, {}, {}

        preprocess = _forward = postprocess = lambda self, x: x

    assert components_of(Encode(model=model, tokenizer=None, device="cpu", task="encode")) == {"model": model}


@pytest.mark.parametrize("key", ["pipe", "pipeline", "anything"])
def test_a_dict_that_holds_a_pipeline_as_wrapper_packs_pass_it_on(flux: Any, key: str) -> None:
    found = components_of({key: flux, "dtype": torch.bfloat16, "base_path": "models/x", "cpu_offloading": False})
    assert set(found) == FLUX_PARTS


def test_a_pipeline_under_sequential_offload_with_bitsandbytes_layers(flux: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    accelerate = pytest.importorskip("accelerate")
    flux.transformer.proj_out = bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False)
    flux.transformer.to("cpu")
    accelerate.cpu_offload(flux.transformer, execution_device=torch.device("cpu"))
    found = components_of(flux)
    assert set(found) == FLUX_PARTS
    assert {p.device.type for p in found["transformer"].parameters()} == {"meta"}
    carriers = {name: [(f.name, f.format_id) for f in find_carriers(module)] for name, module in found.items()}
    assert carriers == {**{name: [] for name in FLUX_PARTS}, "transformer": [("proj_out", "bnb-int8")]}


def test_a_pipeline_under_model_offload_of_diffusers_group_hooks(flux: Any) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    device = torch.device("cpu")
    hooks.apply_group_offloading(flux.transformer, device, device, offload_type="leaf_level", use_stream=False)
    assert components_of(flux)["transformer"] is flux.transformer


# Plain objects


def test_a_module_alone_is_called_model() -> None:
    net = linear()
    assert components_of(net) == {"model": net}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: {"transformer": net},
        lambda net: SimpleNamespace(transformer=net),
        lambda net: MappingProxyType({"transformer": net}),
        lambda net: {"model": SimpleNamespace(model=None, transformer=net)},
        lambda net: [{"unused": "text", "transformer": net}],
        lambda net: SimpleNamespace(_pipe={"pipeline": SimpleNamespace(transformer=net)}),
        lambda net: SimpleNamespace(loaded=SimpleNamespace(transformer=net)),
    ],
    ids=["dict", "attribute", "proxy", "dict-object", "list-dict", "private-pipe", "any-object"],
)
def test_wrappers_of_one_module(wrap: Any) -> None:
    net = linear()
    assert components_of(wrap(net)) == {"transformer": net}


def test_lists_and_tuples_number_what_they_hold() -> None:
    a, b = linear(), linear()
    assert components_of([a, (b, None, "text", 3)]) == {"0": a, "1.0": b}


def test_two_of_the_same_name_are_told_by_their_paths() -> None:
    high, low, clip = linear(), linear(), linear()
    obj = {"high": {"transformer": high}, "low": {"transformer": low}, "clip": clip}
    assert components_of(obj) == {"high.transformer": high, "low.transformer": low, "clip": clip}


def test_one_module_reached_twice_is_listed_once_under_the_shorter_path() -> None:
    net = linear()
    assert components_of({"pipe": {"inner": {"unet": net}}, "transformer": net}) == {"transformer": net}


def test_a_module_inside_another_is_not_listed_beside_it() -> None:
    net = nn.Sequential(linear(), linear())
    assert components_of({"transformer": net, "encoder": net[1]}) == {"transformer": net}


def test_cycles_end() -> None:
    net = linear()
    one, two = SimpleNamespace(transformer=net), SimpleNamespace()
    one.pipe, two.pipe = two, one
    one.models = models = [one]
    models.append(models)
    assert components_of(one) == {"transformer": net}


def test_depth_is_bounded() -> None:
    def nested(depth: int) -> Any:
        return linear() if depth == 0 else {"model": nested(depth - 1)}

    assert len(components_of(nested(4))) == 1
    assert components_of(nested(40)) == {}


def test_work_is_bounded() -> None:
    assert components_of({"clip": [{} for _ in range(200_000)]}) == {}


def many() -> Any:
    """The patches of LoRAs, as wrappers keep them: more lists than are looked at."""
    return {f"blocks.{i}.weight": [(1.0, ("lora",))] for i in range(20_000)}


@pytest.mark.parametrize(
    "holder",
    [
        lambda net: SimpleNamespace(patches=many(), model=net),
        lambda net: {"patches": many(), "model": net},
        lambda net: {"patches": many(), "pipe": SimpleNamespace(transformer=net)},
        lambda net: SimpleNamespace(patches=many(), more=many(), model=patcher(base_model(net))),
        lambda net: {**many(), "model": net},
        lambda net: {"patches": [many(), many()], "model": {"pipe": {"unet": net}}},
    ],
    ids=["attribute", "key", "in-an-object", "in-a-patcher", "beside", "deeper"],
)
def test_a_model_beside_more_than_is_looked_at_is_found(holder: Any) -> None:
    net = linear()
    assert [id(module) for module in components_of(holder(net)).values()] == [id(net)]


@pytest.mark.parametrize("nothing", [None, 3, "text", {}, [], object(), torch.zeros(2), print, int, nn.ReLU()])
def test_nothing_is_found_in_other_things(nothing: Any) -> None:
    assert components_of(nothing) == {}


@dataclasses.dataclass(slots=True)
class Slotted:
    transformer: Any
    dtype: Any = None


def test_slots_are_read() -> None:
    net = linear()
    assert components_of(Slotted(net)) == {"transformer": net}
    unset = Slotted.__new__(Slotted)
    assert components_of(unset) == {}


class Trap:
    """Every property and every call of a lazy object fails the test."""

    def __init__(self, net: nn.Module) -> None:
        self.transformer = net

    @property
    def vae(self) -> Any:
        raise AssertionError("a property was read")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked up")

    def __iter__(self) -> Any:
        raise AssertionError("it was iterated")

    def __len__(self) -> int:
        raise AssertionError("its length was taken")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("it was compared")

    __hash__ = None  # type: ignore[assignment]


class TrapDict(dict[str, Any]):
    def items(self) -> Any:
        raise AssertionError("items() of the object's own was called")

    __getitem__ = __iter__ = values = items  # type: ignore[assignment]


def test_only_what_is_stored_is_read() -> None:
    net = linear()
    assert components_of(Trap(net)) == {"transformer": net}
    assert components_of({"model": Trap(net)}) == {"transformer": net}
    assert components_of(TrapDict(transformer=net)) == {"transformer": net}


class Raising:
    """Whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class ClassRaises:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("which class it is")

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise RuntimeError("which class it is")


class LazyMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise AssertionError("a lazy mapping was read")

    def __iter__(self) -> Any:
        raise AssertionError("a lazy mapping was iterated")

    def __len__(self) -> int:
        raise AssertionError("the length of a lazy mapping was taken")


class RaisingKey(str):
    def __str__(self) -> str:
        raise AssertionError("a key was made text")


class TrapList(list[Any]):
    def __iter__(self) -> Any:
        raise AssertionError("it was iterated")

    __getitem__ = __len__ = __iter__  # type: ignore[assignment]


class OddModuleName:
    __module__ = None  # type: ignore[assignment]


def half_made() -> nn.Module:
    return nn.Linear.__new__(nn.Linear)


def dead() -> Any:
    return weakref.proxy(OddModuleName())


ODD = [Raising, ClassRaises, dead, lambda: MappingProxyType(LazyMapping()), OddModuleName, half_made]


@pytest.mark.parametrize("odd", ODD, ids=["raising", "class", "dead-proxy", "lazy-mapping", "no-module", "half-made"])
def test_objects_that_raise_when_they_are_asked_are_passed_over(odd: Any) -> None:
    net = linear()
    assert components_of(odd()) == {}
    assert components_of({"a": odd(), "transformer": net}) == {"transformer": net}
    assert components_of(SimpleNamespace(model=[odd()], transformer=net)) == {"transformer": net}


def test_names_and_lists_of_other_classes_are_read_without_a_call() -> None:
    net = linear()
    assert components_of({RaisingKey("transformer"): net}) == {"transformer": net}
    assert components_of(SimpleNamespace(models=TrapList([net]))) == {"0": net}
    assert components_of({object(): net}) == {"0": net}
    assert components_of(SimpleNamespace(_modules=["x"], object_patches=3, transformer=net)) == {"transformer": net}


def test_objects_far_from_the_model_are_not_searched() -> None:
    class Job:
        def __init__(self) -> None:
            self.settings = SimpleNamespace(last_result=linear())
            self.settings.history = SimpleNamespace(other=SimpleNamespace(unet=linear()))
            self._cache = SimpleNamespace(thing=linear())

    assert set(components_of(Job())) == {"last_result"}


def test_a_wrapper_module_without_weights_leads_to_what_it_wraps(flux: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pipe = flux

    assert set(components_of({"model": Wrapper()})) == FLUX_PARTS


# ComfyUI, of which tests/comfyui has the real objects


def base_model(net: nn.Module) -> nn.Module:
    model = nn.Module()
    model.diffusion_model, model.model_sampling = net, nn.Module()
    model.model_sampling.register_buffer("sigmas", torch.zeros(4))
    return model


def patcher(model: nn.Module, **kwargs: Any) -> Any:
    return SimpleNamespace(
        **{
            "model": model,
            "offload_device": "cpu",
            "load_device": "cpu",
            "patches": {"x": [(1.0, ("diff", linear()))]},
        },
        **{"parent": SimpleNamespace(model=linear()), "object_patches": {}, "additional_models": {}, **kwargs},
    )


def test_a_stand_in_of_a_model_patcher_leads_to_the_diffusion_model_alone() -> None:
    net = linear()
    assert components_of(patcher(base_model(net))) == {"diffusion_model": net}
    assert components_of({"wan": patcher(base_model(net)), "dtype": None}) == {"diffusion_model": net}


def test_a_stand_in_of_a_model_patcher_with_other_models_on_it() -> None:
    net, other, patch = linear(), linear(), linear()
    found = components_of(
        patcher(
            base_model(net),
            additional_models={"gligen": [patcher(other)]},
            object_patches={"diffusion_model.head": patch, "model_sampling": "x"},
        )
    )
    assert set(map(id, found.values())) == {id(net), id(other), id(patch)}
    assert found["diffusion_model"] is net
    assert found["diffusion_model.head"] is patch


def test_stand_ins_of_clip_vae_and_controlnet() -> None:
    clip_l, t5xxl, decoder, control, before = (linear() for _ in range(5))
    te = nn.ModuleDict({"clip_l": clip_l, "t5xxl": t5xxl})
    clip = SimpleNamespace(cond_stage_model=te, patcher=patcher(te), tokenizer=SimpleNamespace(clip_l=None))
    assert components_of(clip) == {"clip_l": clip_l, "t5xxl": t5xxl}
    assert components_of(SimpleNamespace(first_stage_model=decoder, patcher=patcher(decoder))) == {"vae": decoder}
    previous = SimpleNamespace(control_model=before, control_model_wrapped=patcher(before), previous_controlnet=None)
    net = SimpleNamespace(control_model=control, control_model_wrapped=patcher(control), previous_controlnet=previous)
    found = components_of(net)
    assert found["control_model"] is control
    assert set(map(id, found.values())) == {id(control), id(before)}


# The embedded host


@pytest.fixture(scope="module")
def host() -> Any:
    from quantwire.hosts.standalone.host import StandaloneHost

    return StandaloneHost()


def test_model_clip_and_vae_of_the_embedded_host(host: Any) -> None:
    from quantwire.hosts.standalone.models import load_diffusion_model
    from quantwire.hosts.standalone.text_encoders import load_text_encoder
    from quantwire.hosts.standalone.vae import load_vae

    model = load_diffusion_model(host.resolve("diffusion_models", "digits_flux.safetensors"))
    clip = load_text_encoder([host.resolve("text_encoders", "digits_clip.safetensors")])
    decoder = load_vae(host.resolve("vae", "digits_tae.safetensors"))
    assert components_of(model) == host.components(model) == {"transformer": model.transformer}
    assert components_of(clip) == host.components(clip) == {"clip_l": clip.encoders["clip_l"].module}
    assert components_of(decoder) == host.components(decoder) == {"decoder": decoder.decoder}


def test_the_embedded_host_looks_into_objects_of_others_and_refuses_those_without_modules(host: Any, flux: Any) -> None:
    assert set(host.components({"pipe": flux})) == FLUX_PARTS
    with pytest.raises(SpecError, match=r"got dict, in which no module with weights was found"):
        host.components({"pipe": None})
    with pytest.raises(SpecError, match="Layers can be replaced in a model or text encoders, not in a dict"):
        host.with_layers({"pipe": flux}, {})


def test_looking_imports_nothing() -> None:
    code = (
        "import sys\n"
        "from quantwire.hosts.objects import components_of\n"
        "from torch import nn\n"
        "before = set(sys.modules)\n"
        "assert list(components_of({'pipe': {'unet': nn.Linear(2, 2)}})) == ['unet']\n"
        "print(sorted(set(sys.modules) - before), 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
