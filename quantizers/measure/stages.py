"""What lies on a device in each stage of a generation, by the offload mode of the host.

| mode | on the device while a component computes |
| --- | --- |
| none | every component, all the time |
| model | that component |
| balanced | that component up to the high watermark; the rest of it a layer at a time. Others up to the low watermark |
| group | a block of it at a time, and what is outside of its blocks |
| sequential, novram | a layer of it at a time |
| partial, dynamic | as much of it as there is room for; the rest a layer at a time. Others leave |

Sources: accelerate (`infer_auto_device_map` keeps room for the largest layer that is brought in), diffusers
(`hooks/group_offloading.py`), ComfyUI 0.33 (`model_management.load_models_gpu`, `ModelPatcher.partially_load`), and
the embedded host's own `offload`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..compat.modes import HostName, OffloadMode
from ..spec import QuantSpec
from .activations import Estimate, RunShape, activations
from .buffers import Layer, blocks_of, in_order, layers_of, unpacked_nbytes, with_lora_nbytes
from .parts import ModelPart, Role
from .units import GIB

STAGES = ("text encoding", "sampling", "decoding")
_ROLES = {Role.TEXT: 0, Role.DIFFUSION: 1, Role.CONTROLNET: 1, Role.VAE: 2}
# ComfyUI keeps at least this free beside the weights: 0.8 GiB and 400 MiB (model_management.py:847, :860).
COMFYUI_RESERVE = int(0.8 * GIB) + 400 * 2**20
# Watermarks of balanced by default, as in `hosts.offload`.
SMALL_GIB, LARGE_GIB = 12, 24
# Layers that see one vector a step, long before the peak.
ONE_VECTOR = re.compile(r"(_mod|modulation|adaLN\w*|norm\w*)\.")
# Models of convolutions, which on a CPU copy into a layout of their own that no count of tensors sees: how many percent
# more than the formula says. Measured against torch's allocator, in bfloat16 and small sizes: AutoencoderKL 26 to 34,
# HunyuanVideo's VAE 37, a U-Net of half SD 1.5's width 97. TAESD takes none.
CPU_SCRATCH_PERCENT = {Role.VAE: 40, Role.DIFFUSION: 100}
_NO_SCRATCH = ("taesd",)
_UNETS = ("sdxl", "sd1.5")
_STREAMING = (OffloadMode.SEQUENTIAL, OffloadMode.GROUP, OffloadMode.NOVRAM)  # of every component a part at a time
_FILLING = (OffloadMode.PARTIAL, OffloadMode.DYNAMIC)
SHARED = ("cpu",)  # devices whose memory is that from which weights come


def largest_of(layers: Iterable[Layer]) -> int:
    """Bytes of the largest layer that computes with all tokens."""
    layers = list(layers)
    busy = [x.largest_nbytes for x in layers if not ONE_VECTOR.search(f"{x.name}.")]
    return max(busy or (x.largest_nbytes for x in layers), default=0)


@dataclass(frozen=True)
class Held:
    """A part in its format, as a host holds it.

    Attributes:
        nbytes: weights, and LoRAs on them where the host keeps those in the component.
        loras_nbytes: of these.
        layers: of the weights.
        run: bytes that computing with it takes beside weights and unpacked layers.
        dtype_nbytes: of a value of its activations.
    """

    part: ModelPart
    format_id: str
    nbytes: int
    loras_nbytes: int
    layers: tuple[Layer, ...]
    run: Estimate
    dtype_nbytes: int

    @property
    def stage(self) -> int:
        return _ROLES[self.part.role]

    @property
    def largest_nbytes(self) -> int:
        """Of a layer that computes with all tokens."""
        return largest_of(self.layers)


@dataclass(frozen=True)
class Stage:
    """The worst moment of one stage.

    Attributes:
        component: the part that computes.
        weights: on the device, those of components that wait included.
        buffer: the largest layer while it is unpacked.
        loras: on the device, or made for the largest layer.
        activations: everything else.
        streamed: bytes of weights that are copied to the device each time the component computes.
        error_percent: of `activations`.
        how: where `activations` comes from.
    """

    name: str
    component: str
    weights: int
    buffer: int
    loras: int
    activations: int
    streamed: int = 0
    error_percent: float = 0.0
    how: str = ""

    @property
    def peak(self) -> int:
        return self.weights + self.buffer + self.loras + self.activations


@dataclass(frozen=True)
class Setting:
    """What the stages are worked out for.

    Attributes:
        kind: of device, as in `DeviceFacts`.
        room: bytes of the device that a run may take.
        device_nbytes: that watermarks are shares of.
        own_memory: False where weights wait in the very memory that computes.
        capability: of CUDA; None where it is not known.
    """

    host: HostName
    kind: str
    room: int
    device_nbytes: int
    own_memory: bool
    capability: tuple[int, int] | None = None


def hold(
    part: ModelPart,
    spec: QuantSpec | None,
    shape: RunShape,
    host: HostName,
    loras_nbytes: int = 0,
    dtype_nbytes: int | None = None,
) -> Held:
    """A part in a format, or as it is for None.

    Raises:
        SpecError: a pattern of the spec matches no layer.
    """
    size = dtype_nbytes or compute_nbytes(part)
    layers = layers_of(part, spec, split=host is HostName.STANDALONE and part.family == "flux")
    here = loras_nbytes if part.role is Role.DIFFUSION and host is HostName.STANDALONE else 0
    named = spec.format_id if spec else ", ".join(sorted(part.formats))
    if part.role is Role.CONTROLNET:
        run = Estimate(0, 0.0, "activations of a ControlNet are not known here: not counted", False)
    else:
        run = activations(part.role, _family(part), part.slots, shape, size)
    nbytes = sum(layer.nbytes for layer in layers) if spec else part.held_nbytes
    return Held(part, named, nbytes + here, loras_nbytes, layers, run, size)


def _family(part: ModelPart) -> str:
    """By the hosts' name of a text encoder (`clip_l`, `t5xxl`) where its tensors do not tell: transformers' CLIP has
    lost the prefix that its files have."""
    if part.family or part.role is not Role.TEXT:
        return part.family
    return next((f for f in ("clip", "t5") if part.name.lower().startswith((f, f"um{f}"))), "")


def compute_nbytes(part: ModelPart) -> int:
    """Bytes of a value in which a part computes: that of most of its weights at full precision, at least 2."""
    counts: dict[int, int] = {}
    for slot in part.slots:
        size = slot.meta.dtype.itemsize
        counts[size] = counts.get(size, 0) + slot.meta.numel
    return max(2, max(counts, key=lambda size: counts[size], default=2))


def stages(mode: OffloadMode, held: Sequence[Held], setting: Setting) -> tuple[Stage, ...]:
    """The worst moment of each stage under a mode; stages without a component are left out."""
    found: list[Stage] = []
    for index, name in enumerate(STAGES):
        moments = [_moment(name, mode, h, held, setting) for h in _computing(held, index)]
        if moments:
            found.append(max(moments, key=lambda s: s.peak))
    return tuple(found)


def _computing(held: Sequence[Held], stage: int) -> list[Held]:
    """The parts that compute in a stage one after the other; a ControlNet does so beside its diffusion model."""
    found = [h for h in held if h.stage == stage]
    return [h for h in found if h.part.role is not Role.CONTROLNET] or found


def _moment(name: str, mode: OffloadMode, h: Held, held: Sequence[Held], setting: Setting) -> Stage:
    everything = sum(other.nbytes for other in held)
    on = (setting.kind, h.dtype_nbytes, h.run.rows, setting.capability, setting.host)
    buffer = max((unpacked_nbytes(layer, *on) for layer in h.layers), default=0)
    loras = h.loras_nbytes if h.part.role is Role.DIFFUSION else 0
    if loras and setting.host is HostName.COMFYUI:
        patched = max((with_lora_nbytes(layer, h.dtype_nbytes) for layer in h.layers), default=0)
        buffer, loras = max(buffer, patched), max(1, loras // max(1, sum(1 for x in h.layers if x.numel)))
    beside = buffer + loras * (setting.host is HostName.COMFYUI) + h.run.nbytes
    if not setting.own_memory or mode is OffloadMode.NONE:
        weights, streamed, moving = everything, 0, 0
    else:
        nets = sum(o.nbytes for o in held if o.part.role is Role.CONTROLNET and o is not h and o.stage == h.stage)
        beside += 0 if mode in _STREAMING else nets
        weights, streamed, moving = _on_device(mode, h, held, setting, beside)
        weights += 0 if mode in _STREAMING else nets
    if setting.host is HostName.STANDALONE:
        loras = min(loras, weights) if not streamed else round(loras * min(1.0, weights / max(h.nbytes, 1)))
        weights -= loras
    run = h.run.nbytes
    if streamed and mode not in _FILLING:
        run = _while_moving(mode, h, moving)
    error, how = _error(h, setting)
    return Stage(name, h.part.name, weights, buffer, loras, run, streamed, error, how)


def _error(h: Held, setting: Setting) -> tuple[float, str]:
    """Percent by which the activations may be wrong on a device, and where they come from."""
    error, how = float(h.run.error_percent), h.run.how
    convolutions = (h.part.role is Role.VAE and h.run.formula not in _NO_SCRATCH) or h.run.formula in _UNETS
    if setting.kind != "cpu" or not convolutions:
        return error, how
    more = CPU_SCRATCH_PERCENT[h.part.role]
    said = f"{how}; convolutions on a CPU take scratch space that is not in it, up to {more} % more was measured"
    return max(error, float(more)), said


def _while_moving(mode: OffloadMode, h: Held, moving: int) -> int:
    """Bytes of activations beside so many bytes of weights that come and go.

    The peak comes when these have left, or with them and a share of the activations. What was measured with the largest
    layer is a bound for smaller ones too, where that one stays.
    """
    share, largest = h.run.while_layer, h.largest_nbytes
    if mode is OffloadMode.GROUP:
        share, largest = h.run.while_block, moving
    together = min(h.run.nbytes + moving, round(h.run.nbytes * share) + largest)
    return max(together, h.run.nbytes) - moving


def _on_device(mode: OffloadMode, h: Held, held: Sequence[Held], setting: Setting, beside: int) -> tuple[int, int, int]:
    """(bytes of weights on the device at most, bytes that are copied there each time, the most of them at a time)."""
    if mode is OffloadMode.MODEL:
        return h.nbytes, 0, 0
    if mode in (OffloadMode.SEQUENTIAL, OffloadMode.NOVRAM):
        return h.largest_nbytes, h.nbytes, h.largest_nbytes
    if mode is OffloadMode.GROUP:
        outside, blocks = blocks_of(h.layers)
        largest = max(blocks.values(), default=0)
        return outside + largest, h.nbytes, largest
    if mode is OffloadMode.BALANCED:
        return _balanced(h, held, setting.device_nbytes)
    reserve = COMFYUI_RESERVE if mode is OffloadMode.PARTIAL else 0
    return _filled(h, setting.room - max(beside, reserve))


def _filled(h: Held, room: int) -> tuple[int, int, int]:
    """As much as there is room for, and a layer at a time of the rest."""
    if h.nbytes <= room:
        return h.nbytes, 0, 0
    stays = max(0, room - h.largest_nbytes)
    return stays + h.largest_nbytes, h.nbytes - stays, h.largest_nbytes


def _balanced(h: Held, held: Sequence[Held], device_nbytes: int) -> tuple[int, int, int]:
    low, high = watermarks(device_nbytes)
    weights, streamed, moving = split(h, high)
    waiting = 0
    for other in held:
        if other is not h and other.nbytes <= high and weights + waiting + other.nbytes <= low:
            waiting += other.nbytes
    return weights + waiting, streamed, moving


def watermarks(device_nbytes: int) -> tuple[int, int]:
    """Low and high watermark of balanced at their defaults, bytes."""
    low = 0.0 if device_nbytes <= SMALL_GIB * GIB else 0.2
    return int(device_nbytes * low), int(device_nbytes * (0.8 if device_nbytes >= LARGE_GIB * GIB else 0.6))


def split(h: Held, room: int) -> tuple[int, int, int]:
    """A component in so much room: all of it, or what stays and a layer at a time of the rest.

    accelerate fills the device in the order of the module, whole blocks at a time, and stops at the first that does not
    fit beside the largest of those behind it.
    """
    if h.nbytes <= room:
        return h.nbytes, 0, 0
    rows = in_order(h.layers)
    sizes = [sum(x.nbytes for x in row) for row in rows]
    for index, nbytes in enumerate(sizes):
        stays = sum(sizes[:index])
        if stays + nbytes > room - max(sizes[index + 1 :], default=0):
            moving = largest_of(x for row in rows[index:] for x in row)
            return stays + moving, h.nbytes - stays, moving
    return h.nbytes, 0, 0
