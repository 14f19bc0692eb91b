"""All schemes, in the order in which they may claim a layer: a layer belongs to the first one that finds it."""

from __future__ import annotations

from .base import Scheme
from .bnb import BnbScheme
from .comfy import ComfyScheme
from .compressed import CompressedTensorsScheme
from .gguf import GgufScheme
from .named import AwqScheme, Fp8ScaleScheme, GptqScheme, SvdQuantScheme, TinyChatScheme
from .nncf import NncfScheme
from .own import OwnScheme
from .plain_fp8 import PlainFp8Scheme
from .quanto import QuantoScheme
from .scaled_fp8 import ScaledFp8Scheme
from .sdnq import SdnqScheme
from .torchao import TorchaoScheme
from .unclaimed import UnclaimedScheme

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
    TinyChatScheme(),
    SvdQuantScheme(),
    ScaledFp8Scheme(),
    Fp8ScaleScheme(),
    PlainFp8Scheme(),
)

# Names what the others leave of layers that lost their scales; it looks at all that they found.
UNCLAIMED = UnclaimedScheme()
