"""How a quantized weight was made, kept with it: what is needed to quantize its layer again in the same way.

A merge of a LoRA into a quantized layer dequantizes, adds, and quantizes with the format and the options that the layer
had. Not every option can be read off the tensors, so a weight made with options keeps them in its meta, as the text of
a URI: JSON, hashable, and written to files with the rest of the meta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .spec import QuantSpec
from .weight import QuantizedWeight

SPEC_KEY = "spec"


def remember(weight: QuantizedWeight, spec: QuantSpec) -> QuantizedWeight:
    """The same weight with the options of its spec in its meta; unchanged where all are at their defaults."""
    if not spec.options:
        return weight
    uri = QuantSpec(spec.format_id, options=spec.options).to_uri()
    meta = {**weight.meta, SPEC_KEY: uri}
    return QuantizedWeight(weight.format_id, weight.tensors, weight.orig_shape, weight.orig_dtype, meta)


def spec_of(format_id: str, meta: Mapping[str, Any]) -> QuantSpec:
    """Format and options that a weight was quantized with; no layer patterns.

    Raises:
        SpecError: the format can be loaded but not made.
    """
    uri = meta.get(SPEC_KEY)
    return QuantSpec.from_uri(uri) if uri else QuantSpec(format_id)
