"""How quantized weights are laid out in a new file: the other direction of `schemes/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from ...weight import QuantizedWeight


class Writer(Protocol):
    """One layout of quantized weights in safetensors files.

    Everything follows from the weights and from what `note` kept of them, so that an interrupted conversion can go on:
    the notes of finished layers are in its journal.
    """

    @property
    def id(self) -> str:
        """Of the scheme that reads it; with a variant behind a dash where there are several."""
        ...

    @property
    def title(self) -> str:
        """For people: `bitsandbytes 4-bit, as diffusers saves it`."""
        ...

    @property
    def beside_layers(self) -> Mapping[str, str]:
        """What a layer may have beside its weight (`input_scale`, `pre_quant_scale`) -> the last part of its name."""
        ...

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats whose weights it can hold."""
        ...

    def refuse(self, weight_format: str, options: Mapping[str, Any]) -> str | None:
        """Why weights of a format with these options of its spec cannot be held, or None."""
        ...

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of a weight `X.weight`, by their names in the file.

        Raises:
            SpecError: this weight cannot be held, with the reason.
        """
        ...

    def note(self, name: str, weight: QuantizedWeight) -> Any:
        """JSON value that `metadata` and `config` need to know of a weight; None is nothing."""
        ...

    def once(self, notes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Small tensors that stand in the file once, such as `scaled_fp8`; written last."""
        ...

    def metadata(self, notes: Mapping[str, Any]) -> dict[str, str]:
        """Strings of the file's own metadata.

        Args:
            notes: weight name -> its note, of all quantized weights of the file.
        """
        ...

    def config(self, notes: Mapping[str, Any], plain: tuple[str, ...]) -> dict[str, Any] | None:
        """`quantization_config` of a component's `config.json`; None where no such reader exists.

        Args:
            plain: names of the two-dimensional weights that were kept.
        """
        ...
