"""What BenchmarkModel does: the model as it is and in other formats, each sampled with in turn and measured."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..hosts import bench, current
from ..hosts.base import Host
from ..hosts.eta import with_eta
from ..hosts.sampling import Generation
from ..quantizers.choices import LoraMode, OnFailure, OnQuantized
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import QuantwireError, SpecError
from ..quantizers.measure.html import page
from ..quantizers.measure.meter import Peak, PeakMeter
from ..quantizers.measure.results import (
    FULL,
    BenchmarkResults,
    Difference,
    Memory,
    Seconds,
    Variant,
    summarize,
    write,
)
from ..quantizers.registry import require
from ..quantizers.report import QuantReport, versions
from ..quantizers.spec import QuantSpec
from .request import Request, quantize


@dataclass(frozen=True)
class Asked:
    """The widgets of BenchmarkModel that do not tell how to sample."""

    folder: str
    against: str
    repeats: int
    warmup: int
    order: str
    audio_seconds: float


@dataclass
class Candidate:
    """One variant while it is measured; `spec` is None for the model as it is.

    Attributes:
        model: None before its first run and after its last.
        error: of its run, which ended it.
    """

    name: str
    spec: QuantSpec | None = None
    model: Any = None
    report: QuantReport | None = None
    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    difference: Difference | None = None
    audio_s: float | None = None
    sample: str = ""
    error: str = ""


def formats_of(against: str) -> dict[str, QuantSpec]:
    """Line -> spec, of the formats to compare with; empty lines and what follows # are skipped.

    Raises:
        SpecError: a line that is no format, or twice the same.
    """
    found: dict[str, QuantSpec] = {}
    for line in against.splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        spec = QuantSpec.from_uri(text)
        if text in found or spec in found.values():
            raise SpecError(f"against: {text} stands there twice.")
        found[text] = spec
    return found


def run(
    model: Any, how: Generation, vae: Any, asked: Asked, report: Any = None
) -> tuple[BenchmarkResults, torch.Tensor, Path]:
    """Measure, and write the results.

    Returns:
        the results, the plots as IMAGE, and the path of the page.
    Raises:
        QuantwireError: a format that does not run here, a folder that cannot be written in, or the model as it is
            cannot be sampled with.
    """
    host = current()
    folder = host.output_path(asked.folder)
    specs = formats_of(asked.against)
    for spec in specs.values():
        require(spec.format_id)
    held = bench.formats(host, model)
    if held and specs:
        raise SpecError(
            f"against: the model is quantized already ({', '.join(held)}), and other formats are made of full "
            "precision.\nLink the full-precision model, and name all formats in `against`."
        )
    own = report if isinstance(report, QuantReport) else None
    first = Candidate(max(held, key=lambda f: held[f]) if held else FULL, None, model, own)
    candidates = [first, *(Candidate(name, spec) for name, spec in specs.items())]
    course = _Course(host, model, how, vae, folder, asked.audio_seconds)
    order = bench.Order(asked.order)
    for turn in with_eta(host, bench.turns(len(candidates), asked.warmup, asked.repeats, order), "runs"):
        course.take(candidates[turn.variant], turn)
    notes = list(course.notes)
    if order is bench.Order.INTERLEAVED and specs:
        notes.append(
            "All formats were in memory at once: the peaks hold each other's weights, and what is reserved holds the "
            "allocator's cache of all (`one by one` does not)."
        )
    results = BenchmarkResults(
        title=asked.folder.rpartition("/")[2],
        host=host.name,
        device=bench.device_dict(host, model),
        settings={"repeats": asked.repeats, "warmup": asked.warmup, "order": order.value, **_work(how, vae)},
        versions=versions(),
        started=course.started,
        variants=tuple(_variant(c) for c in candidates),
        notes=tuple(notes),
    )
    from ..quantizers.measure.bench_plots import images

    return results, images(results), write(folder, results, page(results, folder))


class _Course:
    """The benchmark while it runs.

    Attributes:
        output: the first variant's first measured output, which the others are compared with.
    """

    def __init__(self, host: Host, model: Any, how: Generation, vae: Any, folder: Path, audio_seconds: float) -> None:
        self.host, self.model, self.how, self.vae, self.folder = host, model, how, vae, folder
        self.audio_seconds = audio_seconds
        self.device = bench.device_of(host, model)
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.output: Any = None
        self.notes: list[str] = []

    def take(self, candidate: Candidate, turn: bench.Turn) -> None:
        """One run of one variant.

        Raises:
            Exception: the model as it is does not run, or the user stopped; of the others it is kept as their error.
        """
        if candidate.error:
            return
        try:
            self._make(candidate)
            self._run(candidate, turn)
        except Exception as err:  # of one format, out of memory too: what the others measured is not to be lost
            if candidate.spec is None or bench.is_interrupt(err):
                raise
            text = str(err).strip()
            candidate.error = text if isinstance(err, QuantwireError) and text else f"{type(err).__name__}: {text}"
        if candidate.error or turn.last:
            candidate.model = None
        if candidate.error:  # after the handler: the traceback held the tensors of the run
            PeakMeter(self.device).release()

    def _make(self, candidate: Candidate) -> None:
        if candidate.spec is not None and candidate.model is None:
            spec = candidate.spec
            kinds = (LoraMode.EXACT.value, OnFailure.FULL_PRECISION.value, OnQuantized.REFUSE.value)
            asked = Request(spec.format_id, Carrier.QUANTWIRE.value, spec, "", *kinds)
            candidate.model, candidate.report = quantize(self.model, asked)
            self.notes += [f"{candidate.name}: {text}" for text in candidate.report.warnings]
        if not candidate.weights:
            PeakMeter(self.device).release()  # before its first run alone: a cache is part of the speed of the others
            objects = [candidate.model, *([self.vae] if self.vae is not None else [])]
            candidate.weights = bench.weights(self.host, objects)

    def _run(self, candidate: Candidate, turn: bench.Turn) -> None:
        meter, clock = PeakMeter(bench.device_of(self.host, candidate.model)), bench.Clock()

        def after_step() -> None:
            meter.wait()  # a step is what the device did, and not the launch of it
            clock.tick()

        meter.start()
        clock.start()
        output = self.host.sample(candidate.model, self.how, after_step)
        if self.vae is not None:
            output = self.host.decode(self.vae, output)
        meter.wait()
        clock.stop()
        if not turn.measured:
            return
        candidate.seconds.append(clock.seconds)
        candidate.steps += clock.steps()
        candidate.peaks.append(meter.read())
        if turn.first:
            self._look(candidate, output)

    def _look(self, candidate: Candidate, output: Any) -> None:
        """At what the first measured run gave."""
        if not bench.is_finite(output):
            self.notes.append(f"{candidate.name}: nan or inf in its output, so the format does not work here.")
        is_audio = isinstance(output, dict) and "waveform" in output
        if is_audio:
            candidate.audio_s = output["waveform"].shape[0] * output["waveform"].shape[-1] / output["sample_rate"]
        else:
            candidate.audio_s = self.audio_seconds or None
        if self.vae is not None:
            candidate.sample = save_sample(output, self.folder, candidate.name)
        if candidate.spec is None:
            self.output = output
        else:
            candidate.difference = bench.difference(output, self.output)


def _variant(c: Candidate) -> Variant:
    layers, config = summarize([c.report.to_dict()]) if c.report else ((), {})
    allocated = [p.allocated for p in c.peaks if p.allocated is not None]
    reserved = [p.reserved for p in c.peaks if p.reserved is not None]
    method = c.peaks[0].method if c.peaks else ""
    return Variant(
        name=c.name,
        uri=c.report.uri if c.report else "",
        generation=Seconds(tuple(c.seconds)) if c.seconds else None,
        step=Seconds(tuple(c.steps)) if c.steps else None,
        quantize_s=c.report.seconds if c.report and c.spec else None,
        memory=Memory(c.weights, max(allocated, default=None), max(reserved, default=None), None, method),
        layers=layers,
        difference=c.difference,
        audio_s=c.audio_s,
        sample=c.sample,
        config=config,
        error=c.error,
    )


def _work(how: Generation, vae: Any) -> dict[str, Any]:
    """What decides how much a generation is."""
    samples = how.latent["samples"]
    parts: Iterable[Any] = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    return {
        "latent": [list(p.shape) for p in parts],
        "steps": how.steps,
        "cfg": how.cfg,
        "sampler": how.sampler_name,
        "scheduler": how.scheduler,
        "denoise": how.denoise,
        "seed": how.seed,
        "decoded": vae is not None,
    }


def save_sample(output: Any, folder: Path, name: str) -> str:
    """Write the first image as PNG, or the first sound as WAV; the name of the file."""
    import numpy as np

    stem = "sample-" + re.sub(r"[^\w.-]+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(output, dict):
        import wave

        values = output["waveform"][0].detach().float().cpu().clamp(-1, 1).T.numpy()  # (L, C)
        with wave.open(str(folder / f"{stem}.wav"), "wb") as file:
            file.setnchannels(values.shape[1])
            file.setsampwidth(2)
            file.setframerate(int(output["sample_rate"]))
            file.writeframes((np.nan_to_num(values) * 32767).astype("<i2").tobytes())
        return f"{stem}.wav"
    from PIL import Image

    pixels = output[0].detach().float().cpu().numpy()
    pixels = np.clip(np.nan_to_num(pixels) * 255 + 0.5, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{stem}.png")
    return f"{stem}.png"
