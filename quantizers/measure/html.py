"""The page of a benchmark: one HTML file that asks nothing of the network, for phones and screens, light and dark.

Plots are SVG images in data addresses, drawn once for each of the two colour schemes; the browser takes the one that
the system asks for. There is no script: the page works wherever HTML is shown, in sandboxes too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from . import bench_plots
from .bench_plots import DARK, LIGHT, to_svg
from .results import (
    CONFIG,
    RESULTS,
    BenchmarkResults,
    LayerError,
    Variant,
    against_quantized,
    peak_notes,
    show_number,
    show_peak,
    verdict,
)
from .units import show_size

WORST = 12  # layers in the table of a variant
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".wav": "audio/wav", ".flac": "audio/flac",
          ".opus": "audio/ogg", ".mp3": "audio/mpeg", ".mp4": "video/mp4", ".webm": "video/webm"}  # fmt: skip
_MOST_SAMPLE = 8 * 2**20  # bytes of a sample inside the page

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f4f6f8; --text: #1c1e21; --soft: #59616b; --line: #d5d9df;
  --mark: #0065a3; --bad: #a83c00; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1f2428; --text: #e6e8eb; --soft: #a3acb6;
  --line: #3a4149; --mark: #6cc0f5; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.verdict { font-size: 1.1rem; margin: 0 0 .25rem; } .soft { color: var(--soft); margin: 0; } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th, td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; white-space: normal; }
thead th { white-space: normal; } tbody th { color: var(--text); } .numbers + .plots { margin-top: 1rem; }
p + .numbers { margin-top: .5rem; }
.plots, .samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; }
figure img { display: block; width: 100%; height: auto; } .samples img { image-rendering: auto; border-radius: .25rem; }
figure audio, figure video { width: 100%; } figcaption { font-weight: 600; margin-bottom: .5rem; }
details { background: var(--card); border-radius: .5rem; padding: .6rem .75rem; margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; } dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 46rem) {
  details th, details td { font-size: .85rem; padding: .3rem .25rem; }
  .cards thead { display: none; } .cards tr { display: block; background: var(--card); border-radius: .5rem;
    padding: .5rem .75rem; margin: .5rem 0; }
  .cards td, .cards tbody th { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .15rem 0;
    text-align: right; } .cards tbody th { font-size: 1.05rem; }
  .cards td::before { content: attr(data-name); color: var(--soft); text-align: left; }
  .cards td.none { display: none; }
}
"""


def page(results: BenchmarkResults, folder: Path | None = None) -> str:
    """The whole page.

    Args:
        folder: where the samples lie; None leaves them out.
    """
    title = escape(f"Benchmark: {results.title}")
    parts = [
        f"<h1>{title}</h1><p class='verdict'>{escape(verdict(results))}</p><p class='soft'>{_where(results)}</p>",
        _failures(results.variants),
        "<h2>Numbers</h2>",
        _table(results),
        "<div class='plots'>" + "".join(_pictures(results)) + "</div>",
        _samples(results.done, folder) if folder else "",
        _layers(results.done),
        _facts(results),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _where(results: BenchmarkResults) -> str:
    device = results.device.get("name") or "device not told"
    settings = results.settings
    runs = f"{settings.get('repeats')} measured runs of each after {settings.get('warmup')} to warm up"
    return escape(f"{device}, {results.host}; {runs}, {settings.get('order')}; {results.started}")


def _failures(variants: Iterable[Variant]) -> str:
    return "".join(f"<p class='bad'><b>{escape(v.name)}</b> failed: {escape(v.error)}</p>" for v in variants if v.error)


def _cells(v: Variant, of: str) -> dict[str, str]:
    """Column -> text; empty where there is no number. `of` is the reference where it is quantized itself."""
    against = f" to {of}" if of else ""
    m, d = v.memory, v.difference
    return {
        "generation (s)": show_number(v.generation.median) if v.generation else "",
        "slowest (s)": show_number(max(v.generation.samples)) if v.generation else "",
        "a step (s)": show_number(v.step.median) if v.step else "",
        "load (s)": show_number(v.load_s) if v.load_s is not None else "",
        "quantize (s)": show_number(v.quantize_s) if v.quantize_s is not None else "",
        "weights": show_size(m.weights_total) if m.weights_total else "",
        "peak": show_peak(m),
        "reserved": show_size(m.peak_reserved) if m.peak_reserved else "",
        f"PSNR{against} (dB)": f"{d.psnr_db:.1f}" if d and d.psnr_db is not None else "",
        f"difference{against}": ("none" if not d.relative_error else f"{100 * d.relative_error:.3g} %") if d else "",
        "x real time": show_number(v.real_time_factor) if v.real_time_factor is not None else "",
    }


def _table(results: BenchmarkResults) -> str:
    of = results.quantized_base
    rows = [(v.name, _cells(v, of)) for v in results.done]
    if not rows:
        return ""
    columns = [name for name in rows[0][1] if any(cells[name] for _, cells in rows)]
    head = "<th>format</th>" + "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f"<td data-name='{escape(c)}'{'' if cells[c] else ' class=none'}>{escape(cells[c]) or '-'}</td>"
            for c in columns
        )
        + "</tr>"
        for name, cells in rows
    )
    said = [*([against_quantized(of)] if of else []), *peak_notes(results)]
    notes = "".join(f"<p class='soft'>{escape(text)}</p>" for text in said)
    return f"{notes}<table class='cards numbers'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _pictures(results: BenchmarkResults) -> Iterable[str]:
    dark = bench_plots.plots(results, DARK)
    for name, figure in bench_plots.plots(results, LIGHT).items():
        light_svg, dark_svg = (_data(to_svg(f).encode(), "image/svg+xml") for f in (figure, dark[name]))
        yield (
            f"<figure><figcaption>{escape(name)}</figcaption><picture>"
            f"<source media='(prefers-color-scheme: dark)' srcset='{dark_svg}'>"
            f"<img alt='{escape(name)}; the numbers are in the table' src='{light_svg}'></picture></figure>"
        )


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _samples(variants: Iterable[Variant], folder: Path) -> str:
    figures = [_sample(v, folder / v.sample) for v in variants if v.sample]
    return f"<h2>Samples, same seed</h2><div class='samples'>{''.join(figures)}</div>" if figures else ""


def _sample(v: Variant, path: Path) -> str:
    kind = _TYPES.get(path.suffix.lower(), "")
    label = f"<figcaption>{escape(v.name)}</figcaption>"
    if not kind or path.stat().st_size > _MOST_SAMPLE:
        return f"<figure>{label}<p>{escape(path.name)}, beside this page.</p></figure>"
    data = _data(path.read_bytes(), kind)
    if kind.startswith("image"):
        return f"<figure>{label}<img alt='Output of {escape(v.name)}' src='{data}'></figure>"
    tag = kind.partition("/")[0]
    return f"<figure>{label}<{tag} controls src='{data}'></{tag}></figure>"


def _layers(variants: Iterable[Variant]) -> str:
    parts: list[str] = []
    for v in variants:
        if v.layers:
            parts.append(f"<details><summary>{escape(v.name)}: {len(v.layers)} layers</summary>{_worst(v)}</details>")
    return f"<h2>Layers that lost most</h2>{''.join(parts)}" if parts else ""


def _worst(v: Variant) -> str:
    mixed = len({x.format_id for x in v.layers}) > 1
    rows = "".join(
        f"<tr><td>{escape(x.name)}</td>{f'<td>{escape(x.format_id)}</td>' if mixed else ''}"
        f"<td>{_number(x.sqnr_db)}</td><td>{'-' if x.max_error is None else f'{x.max_error:.3g}'}</td></tr>"
        for x in sorted(v.layers, key=_rank)[:WORST]
    )
    head = f"<tr><th>layer</th>{'<th>format</th>' if mixed else ''}<th>SQNR (dB)</th><th>max error</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _rank(layer: LayerError) -> float:
    return float("inf") if layer.sqnr_db is None else layer.sqnr_db


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _facts(results: BenchmarkResults) -> str:
    methods = "; ".join(dict.fromkeys(v.memory.method for v in results.done if v.memory.method))
    said: dict[str, object] = {
        "title": results.title,
        "host": results.host,
        **{f"device {k.removesuffix('_nbytes').replace('_', ' ')}": _shown(k, x) for k, x in results.device.items()},
        **results.settings,
        "peak": methods or "not measured",
    }
    notes = "".join(f"<p>{escape(n)}</p>" for n in results.notes)
    versions = f"<details><summary>Versions</summary>{_list(results.versions)}</details>"
    files = f"<p class='soft'>Beside this page: {RESULTS}, {CONFIG}.</p>"
    return f"<h2>How it was measured</h2>{_list(said)}{notes}{versions}{files}"


def _shown(name: str, value: object) -> object:
    return show_size(value) if name.endswith("_nbytes") and isinstance(value, int) else value


def _list(values: Mapping[str, object]) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    return f"<dl>{rows}</dl>"
