"""The command line: results, and for bad input a line that names it, the exit code, and no half-written file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from quantwire.cli import _caused_by_interrupt, main
from quantwire.quantizers import overview
from quantwire.quantizers.formats import BACKENDS
from quantwire.quantizers.registry import format_ids, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from safetensors import safe_open
from safetensors.torch import save_file

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
Edit = Callable[[dict[str, Any]], Any]


# --- results ---


def test_run_saves_an_image_with_its_workflow(quantwire: Any, api: Any, tmp_path: Path) -> None:
    options = ["--set", "Prompt.text=a two", "--set", "Save.filename_prefix=sub/%width%x%height%_%batch_num%_n"]
    done = quantwire("full_precision", *options, "--set", "Latent.batch_size=2", "--json", str(tmp_path / "r.json"))
    assert done.code == 0, done.err
    assert done.files == ["sub/64x64_0_n_00001_.png", "sub/64x64_1_n_00002_.png"]
    assert done.out.split() == [str(tmp_path / "out" / f) for f in done.files]
    want = api("full_precision")
    want["5"]["inputs"]["text"] = "a two"
    want["8"]["inputs"]["batch_size"] = 2
    want["11"]["inputs"]["steps"] = 1
    want["13"]["inputs"]["filename_prefix"] = "sub/%width%x%height%_%batch_num%_n"
    with Image.open(tmp_path / "out" / done.files[0]) as image:
        assert image.size == (64, 64)
        assert json.loads(image.text["prompt"]) == want  # type: ignore[attr-defined]
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["status"], report["exit_code"], report["error"]) == ("ok", 0, None)
    assert [i["subfolder"] for i in report["outputs"]["13"]["images"]] == ["sub", "sub"]
    assert set(report["timings_s"]) == set(want)


def test_counters_continue_after_the_highest(quantwire: Any, tmp_path: Path) -> None:
    quantwire("full_precision")
    folder = tmp_path / "out"
    (folder / "full_precision_00041_.png").write_bytes(b"")
    (folder / "full_precision_and_more_00099_.png").write_bytes(b"")
    again = quantwire("full_precision")
    assert "full_precision_00042_.png" in again.files
    assert len(again.files) == 4


@pytest.mark.parametrize("prefix", ["../escaped", "sub/../../escaped", "/tmp/escaped", ""])
def test_prefix_that_leads_outside(quantwire: Any, tmp_path: Path, prefix: str) -> None:
    done = quantwire("full_precision", "--set", f"Save.filename_prefix={prefix}")
    done.assert_refused("filename_prefix", "node 13 'Save' (SaveImage)")
    assert not list(tmp_path.glob("*escaped*"))


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_weight_dtype(quantwire: Any, dtype: str) -> None:
    done = quantwire("full_precision", "--set", f"Model.weight_dtype={dtype}")
    assert done.code == 0, done.err
    assert done.files == ["full_precision_00001_.png"]


def test_fast_fp8_is_refused_with_a_way_out(quantwire: Any) -> None:
    quantwire("full_precision", "--set", "Model.weight_dtype=fp8_e4m3fn_fast").assert_refused("SpecError", "does not")


# --- graphs that cannot run ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g["11"].update(class_type="KSamplerSelect"), ["node 11", "no node 'KSamplerSelect'"]),
        (lambda g: g["2"].update(class_type="QuantiseModel"), ["node 2", "Did you mean QuantizeModel"]),
        (lambda g: g["2"]["inputs"].pop("model"), ["node 2", "model: the required input is missing"]),
        (lambda g: g["2"]["inputs"].update(model=["77", 0]), ["node 2", "linked to node 77"]),
        (lambda g: g["2"]["inputs"].update(model=["3", 0]), ["part of a cycle", "2 (QuantizeModel)"]),
        (lambda g: g["2"]["inputs"].update(model=["4", 0]), ["node 2", "expected MODEL", "CLIP"]),
        (lambda g: g["2"]["inputs"].update(model=["1", 3]), ["node 2", "output 3"]),
        (lambda g: g["11"]["inputs"].update(steps="many"), ["node 11", "expected INT, got 'many'"]),
        (lambda g: g["11"]["inputs"].update(steps=0), ["node 11", "0 is below the minimum 1"]),
        (lambda g: g["11"]["inputs"].update(cfg=1e9), ["node 11", "above the maximum 100"]),
        (lambda g: g["11"]["inputs"].update(sampler_name="dpmpp_2m"), ["node 11", "not one of: euler"]),
        (lambda g: g["2"]["inputs"].update(format="bnb-nf5"), ["node 2", "Did you mean bnb-nf4"]),
        (lambda g: g["2"]["inputs"].update(format="Q4_K"), ["node 2", "Did you mean gguf-q4-k?", "quantwire convert"]),
        (lambda g: g["2"]["inputs"].update(carrier="ours"), ["node 2", "quantwire, library"]),
        (lambda g: g["1"]["inputs"].update(unet_name="digit_flux.safetensors"), ["node 1", "Did you mean digits_flux"]),
    ],
    ids=[
        "unknown-node", "misspelt-node", "missing-input", "dangling-link", "cycle", "wrong-type", "output-index",
        "text-for-int", "below-range", "above-range", "sampler", "format", "gguf-type", "carrier", "file",
    ],
)  # fmt: skip
def test_bad_graphs(quantwire: Any, api: Any, change: Edit, said: list[str]) -> None:
    graph = api("quantized")
    change(graph)
    quantwire(graph).assert_refused(*said)


def test_missing_file_names_the_folder_and_what_is_there(quantwire: Any, demo_models: Path) -> None:
    done = quantwire("full_precision", "--set", "VAE.vae_name=taef1.safetensors")
    done.assert_refused(
        "'taef1.safetensors' is not in", str(demo_models / "vae"), "Files there: digits_tae.safetensors"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("Sampler.stepz=4", "Did you mean steps"),
        ("Samplers.steps=4", "Did you mean Sampler"),
        ("nonsense", "expected NODE.INPUT=VALUE"),
        ("Sampler.steps=4.5", "expected INT, got '4.5'"),
    ],
)
def test_bad_overrides(quantwire: Any, override: str, said: str) -> None:
    quantwire("full_precision", "--set", override).assert_refused(said)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nodes": [], "links": []}', '{"1": 5}'])
def test_files_that_are_no_workflow(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text, encoding="utf-8")
    assert main(["run", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err.splitlines()[0]
    assert "Traceback" not in err


def test_model_folder_that_is_none(quantwire: Any) -> None:
    quantwire("full_precision", "--models", "/no/such/folder").assert_refused("'/no/such/folder' is not a folder")


# --- blocked, failed, interrupted ---


def test_conflict_is_blocked_before_sampling(quantwire: Any, tmp_path: Path) -> None:
    done = quantwire("conflict", "--json", str(tmp_path / "r.json"))
    done.assert_refused(
        "OffloadConflict: node 3 'Offload check'", "bnb-nf4", "cannot run with sequential offload", code=3
    )
    assert "Ways out:" in done.err
    assert "KSampler" not in done.err
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["status"], report["exit_code"]) == ("blocked", 3)
    assert report["error"]["node"] == {"id": "3", "title": "Offload check", "class_type": "OffloadCompat"}


@pytest.fixture
def odd_activation(models: Path, demo_models: Path) -> str:
    """A text encoder whose metadata names an activation that transformers does not have: no check foresees it."""
    with safe_open(demo_models / "text_encoders" / "digits_clip.safetensors", "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    config = json.loads(metadata["config"]) | {"hidden_act": "no_such_activation"}
    save_file(tensors, models / "text_encoders" / "odd.safetensors", metadata | {"config": json.dumps(config)})
    return "Text encoder.clip_name=odd.safetensors"


def test_unforeseen_failure_of_a_node(quantwire: Any, odd_activation: str) -> None:
    done = quantwire("full_precision", "--set", odd_activation)
    done.assert_refused("NodeFailed: node 4 'Text encoder' (CLIPLoader)", code=4)
    done = quantwire("full_precision", "--set", odd_activation, "--debug")
    assert done.code == 4
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("NodeFailed: node 4")


def test_places_that_cannot_be_written_are_found_before_the_run(quantwire: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    done = quantwire("full_precision", "--out", str(tmp_path / "file"))
    done.assert_refused("FileError: --out: cannot write in ")
    done = quantwire("full_precision", "--json", str(tmp_path / "file" / "r.json"))
    done.assert_refused("FileError: --json: cannot write in ")


def test_an_output_folder_that_goes_away_in_mid_run(quantwire: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    done = quantwire("full_precision", "--set", "Save.filename_prefix=sub/a", "--out", str(tmp_path / "out"))
    assert done.code == 0
    (tmp_path / "out" / "taken").write_text("in the way", encoding="utf-8")
    done = quantwire("full_precision", "--set", "Save.filename_prefix=taken/a", "--out", str(tmp_path / "out"))
    assert done.code == 2
    assert done.first.startswith("FileError: node 13 'Save' (SaveImage): Images cannot be written to")


@pytest.mark.slow
def test_library_that_is_not_installed(outcome: Any, tmp_path: Path, demo_models: Path) -> None:
    """A process in which neither bitsandbytes nor its metadata can be found."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hiding:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] != 'bitsandbytes': return self.finder.find_spec(name, path, target)\n"
        "    def find_distributions(self, *args, **kwargs):\n"
        "        found = getattr(self.finder, 'find_distributions', lambda *a, **k: ())(*args, **kwargs)\n"
        "        return (d for d in found if d.name != 'bitsandbytes')\n"
        "    def invalidate_caches(self): pass\n"
        "sys.meta_path[:] = [Hiding(f) for f in sys.meta_path]\n",
        encoding="utf-8",
    )
    code = "from quantwire.cli import main; import sys; main(['formats', '--json']); sys.exit(main(sys.argv[1:]))"
    arguments = ["run", str(WORKFLOWS / "quantized.json"), "--models", str(demo_models), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    formats = {f["id"]: f for f in json.loads(done.stdout)}
    assert not formats["bnb-nf4"]["works"]
    assert formats["gguf-q8-0"]["works"]
    what = outcome(done.returncode, done.stdout, done.stderr, tmp_path / "out")
    what.assert_refused("BackendUnavailable: node 2 'Quantize' (QuantizeModel): bnb-nf4: bitsandbytes is not installed")
    assert "pip install bitsandbytes" in done.stderr
    assert "KSampler" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
def test_ctrl_c_in_mid_sampling(tmp_path: Path, demo_models: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(WORKFLOWS / "full_precision.json"), "--set", "Sampler.steps=10000", "--out", str(out)]
    arguments += ["--models", str(demo_models), "--json", str(tmp_path / "r.json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "quantwire.cli", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        heard = []
        for line in process.stderr:  # the sampler starts when all that it needs is done
            heard.append(line)
            if "EmptySD3LatentImage" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        heard += process.communicate(timeout=60)[1].splitlines(keepends=True)
    finally:
        process.kill()
    err = "".join(heard)
    assert process.returncode == 130, err
    assert "stopped  node 11 'Sampler' (KSampler)" in err
    assert err.endswith("Interrupted.\n")
    assert "Traceback" not in err
    assert not out.exists() or not list(out.iterdir())
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["status"], report["exit_code"]) == ("interrupted", 130)


def test_exit_code_reaches_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantwire.cli", "run", "no_such.json"], cwd=tmp_path, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("FileError: no_such.json: does not exist.")
    assert done.stdout == ""


# --- formats ---


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    text = capsys.readouterr().out
    assert all(f in text for f in ("bnb-nf4", "quanto-qint8", "gguf-q4-0"))
    assert main(["formats", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = {"id", "works", "reason", "remedy", "version", "bits", "backend", "writable"}
    assert all(set(r) == keys for r in rows)
    assert [r["id"] for r in rows] == format_ids(writable=False)
    assert all(bool(r["reason"]) is not r["works"] for r in rows)
    working = [r for r in rows if r["works"]]
    writable = sum(r["writable"] for r in working)
    assert text.splitlines()[-1] == f"{len(working)} of {len(rows)} formats work here ({writable} writable)"


@pytest.mark.slow
def test_formats_verbose_names_the_kernel_that_a_product_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is what `kernel` answers for each number of tokens, each number once."""
    assert main(["formats", "--verbose", "--json"]) == 0
    rows = {r["id"]: r for r in json.loads(capsys.readouterr().out)}
    assert main(["formats", "--verbose"]) == 0
    text = capsys.readouterr().out
    w = torch.randn(overview.SHAPE, dtype=torch.bfloat16)
    for format_id, row in rows.items():
        if not (row["works"] and row["writable"]):
            assert not row.get("kernels"), format_id
            continue
        assert [t for k in row["kernels"] for t in k["tokens"]] == list(overview.TOKENS), format_id
        quantizer = get_quantizer(format_id)
        q = quantizer.quantize(w, QuantSpec(format_id))
        for choice in row["kernels"]:
            for tokens in choice["tokens"]:
                kernel = quantizer.kernel(q, overview.compute_device(), torch.bfloat16, tokens)
                assert (kernel.name, kernel.reason) == (choice["name"], choice["reason"]), format_id
            assert f"{choice['name']} ({choice['reason']})" in text


@pytest.mark.parametrize(
    ("tokens", "shown"), [((1, 16), "1-16 tokens"), ((256,), "256 tokens"), ((1024, 4096), "1024+ tokens")]
)
def test_ranges_of_tokens(tokens: tuple[int, ...], shown: str) -> None:
    assert str(overview.KernelChoice(tokens, "a product", "a reason")) == f"{shown}: a product (a reason)"


# --- help ---


def test_help_lists_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    text = capsys.readouterr().out
    for backend in (b for b in BACKENDS if b.entries):
        assert backend.package in text
        assert any(line.startswith(f"{backend.name} ") for line in text.splitlines())


def test_help_on_backends_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "bnb", "gguf-q8-0", "bnb-nf4"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith(("bnb: ", "gguf: "))] == [
        "bnb: bitsandbytes (MIT)",
        "gguf: libggml-python (MIT)",
    ]
    assert "int8-threshold: number from 0 to 10; default 6; bnb-int8" in text


def test_help_on_an_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "bnb", "quantoo"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("SpecError: Unknown backend or format 'quantoo'. Did you mean quanto")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["quantise"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def lazy_import() -> None:
    """What diffusers' lazy modules do with a Ctrl-C that arrives while they import."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        raise ImportError("a lazy import failed") from interrupt


def test_an_interrupt_that_a_library_swallowed_is_still_an_interrupt() -> None:
    with pytest.raises(ImportError) as failure:
        lazy_import()
    assert _caused_by_interrupt(failure.value)
    assert not _caused_by_interrupt(ImportError("of its own"))


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "quantwire", "--version"], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "quantwire")


def test_a_missing_library_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; from quantwire.cli import main; sys.exit(main(sys.argv[1:]))"
    workflow = str(Path(__file__).resolve().parents[2] / "workflows" / "quantized.json")
    command = [sys.executable, "-c", code, "lint", workflow]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    assert "torch" in done.stderr.splitlines()[0]
    assert done.stderr.splitlines()[1].startswith("Run `pip install quantwire[standalone]`")
