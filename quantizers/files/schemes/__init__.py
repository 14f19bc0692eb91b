"""All schemes, in the order in which they may claim a layer: a layer belongs to the first one that finds it."""

from __future__ import annotations

from .base import Scheme
from .bnb import BnbScheme
from .comfy import ComfyScheme
from .compressed import CompressedTensorsScheme
from .gguf import GgufScheme
from .named import AwqScheme, GptqScheme, SvdQuantScheme
from .nncf import NncfScheme
from .own import OwnScheme
from .plain_fp8 import PlainFp8Scheme
from .quanto import QuantoScheme
from .scaled_fp8 import ScaledFp8Scheme
from .sdnq import SdnqScheme
from .torchao import TorchaoScheme

SCHEMES: tuple[Scheme, ...] = (
    OwnScheme(),
    GgufScheme(),
    BnbScheme(),
    ComfyScheme(),
    QuantoScheme(),
    TorchaoScheme(),
    SdnqScheme(),
    NncfScheme(),
    CompressedTensorsScheme(),
    GptqScheme(),
    AwqScheme(),
    SvdQuantScheme(),
    ScaledFp8Scheme(),
    PlainFp8Scheme(),
)
