"""Raw errors of libraries in the real host, explained on models that the pack quantized, without OffloadCompat."""

from __future__ import annotations

from typing import Any

from graphs import node, sampled, unet


def test_library_layers_bring_their_explanation(comfyui: Any) -> None:
    """Another pack offloads the layers by itself (`ProbeHooks`: accelerate's sequential offload)."""
    nodes = {
        "model": unet(),
        "q": node("QuantizeModel", model=["model", 0], format="bnb-nf4", carrier="library"),
        "hooks": node("ProbeHooks", model=["q", 0]),
    }
    error = comfyui.fail(sampled(("hooks", 0), nodes))
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == ("KSampler", "OffloadConflict")
    first, second, *rest = error["exception_message"].splitlines()
    assert first.startswith("bnb-nf4 (")
    assert " stopped with sequential offload (memory): " in first  # not with what the host seems to have done
    assert "the quantization state" in first
    assert "Cannot copy out of meta tensor; no data!" in second
    assert rest[0] == "Ways out:"
    assert "quantwire" in rest[1]
    assert not any("set_mode" in line or "report" in line for line in rest)


def test_full_precision_brings_none(comfyui: Any) -> None:
    """Raw errors of models that the pack did not touch stay the host's own."""
    nodes = {"model": unet(), "hooks": node("ProbeHooks", model=["model", 0])}
    comfyui.run(sampled(("hooks", 0), nodes))
