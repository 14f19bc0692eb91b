"""`quantwire imatrix`: what is recorded is what went into the layers, under the names of a GGUF file, or nothing is."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire import nodes
from quantwire.cli import main
from quantwire.hosts import use
from quantwire.hosts.modules import with_layers
from quantwire.hosts.record import BLOCK_VALUES, Recorder, describe
from quantwire.hosts.standalone.core_nodes import CORE_NODES, KSampler
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.record import encoder_layers
from quantwire.quantizers.apply import quantize_linears, quantize_tensor
from quantwire.quantizers.errors import WorkflowError
from quantwire.quantizers.files.checkpoint import read_checkpoint
from quantwire.quantizers.files.imatrix import Imatrix, Sums, read_imatrix, write_imatrix
from quantwire.quantizers.ggml_types import format_id
from quantwire.quantizers.registry import require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear
from torch import Tensor, nn

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
QKV = "double_blocks.0.img_attn.qkv.weight"


class Command:
    """One `quantwire imatrix` in this process."""

    def __init__(self, folder: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.models, self.capsys = folder, models, capsys
        self.out, self.err = "", ""

    def __call__(self, workflow: str | dict[str, Any], *arguments: str, to: str = "a.gguf", code: int = 0) -> Path:
        graph = json.loads((WORKFLOWS / f"{workflow}.json").read_text()) if isinstance(workflow, str) else workflow
        for node in graph.values():
            if node["class_type"] == "KSampler" and node["inputs"].get("steps") == 8:
                node["inputs"]["steps"] = 2
        path = self.folder / "workflow.json"
        path.write_text(json.dumps(graph), encoding="utf-8")
        target = self.folder / to
        self.capsys.readouterr()
        got = main(["imatrix", str(path), "--out", str(target), "--models", str(self.models), *arguments])
        self.out, self.err = self.capsys.readouterr()
        assert got == code, self.err
        return target

    def record(self, workflow: str | dict[str, Any], *arguments: str, to: str = "a.gguf") -> Imatrix:
        return read_imatrix(self(workflow, "--overwrite", *arguments, to=to))

    def refused(self, *said: str) -> None:
        first = next(line for line in self.err.splitlines() if re.match(r"[A-Z]\w*Error: ", line))
        for word in said:
            assert word in first
        assert "Traceback" not in self.err


@pytest.fixture
def imatrix(tmp_path: Path, demo_models: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, demo_models, capsys)


def file_weights(demo_models: Path) -> dict[str, Tensor]:
    """The matrices of the demo model's file."""
    tensors = read_checkpoint(demo_models / "diffusion_models" / "digits_flux.safetensors").tensors
    return {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.ndim == 2}


# --- exactness ---


def saved_inputs(graph: dict[str, Any], demo_models: Path, folder: Path) -> list[tuple[nn.Linear, list[Tensor]]]:
    """Run a workflow with everything kept that enters a linear layer of its model."""
    kept: dict[nn.Linear, list[Tensor]] = {}

    class Spying(KSampler):
        def sample(self, model: Any, **inputs: Any) -> tuple[Any]:
            for module in model.transformer.modules():
                if isinstance(module, nn.Linear):
                    kept[module] = []
                    module.register_forward_pre_hook(lambda m, args: kept[m].append(args[0].clone()))
            return super().sample(model=model, **inputs)

    classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS, "KSampler": Spying}
    with use(StandaloneHost([demo_models], folder / "images")):
        Executor(classes).run(graph)
    return list(kept.items())


def test_the_sums_are_those_of_saved_inputs(imatrix: Command, demo_models: Path, tmp_path: Path) -> None:
    """Whose inputs they are is found by the weights: the rows of a layer stand somewhere in one matrix of the file."""
    graph = json.loads((WORKFLOWS / "full_precision.json").read_text())
    graph["11"]["inputs"] |= {"steps": 2, "cfg": 2.0}
    graph["8"]["inputs"]["batch_size"] = 2
    matrix = imatrix.record(graph)
    weights = file_weights(demo_models)
    assert matrix.entries.keys() == weights.keys()
    assert matrix.chunk_count == 4  # two steps with two prompts
    layers = saved_inputs(graph, demo_models, tmp_path)
    found: dict[str, int] = {}
    for layer, inputs in layers:
        k = layer.in_features
        homes = [n for n, w in weights.items() if w.shape[1] == k and bool((w == layer.weight[0]).all(1).any())]
        assert len(homes) == 1
        found[homes[0]] = found.get(homes[0], 0) + layer.out_features
        x = torch.cat([i.reshape(-1, k) for i in inputs]).double()
        sums = matrix.entries[homes[0]]
        assert torch.equal(sums.squares[0].float(), (x * x).sum(0).float())
        assert sums.counts.tolist() == [len(x)]
    assert found == {name: len(w) for name, w in weights.items()}, "every row of the file was looked at"


def test_long_inputs_are_summed_in_blocks() -> None:
    recorder = Recorder()
    x = torch.randn(3, 2 * BLOCK_VALUES // 64 + 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = x.clone()
    recorder.add("a", x)
    recorder.add("a", x[0, 0])  # a single vector is one input
    recorder.add("a", x[:0])
    wanted = (x.double() ** 2).sum((0, 1)) + x[0, 0].double() ** 2
    sums = recorder.matrix("").entries["a"]
    assert torch.allclose(sums.squares[0], wanted, rtol=1e-14, atol=0)
    assert sums.counts.tolist() == [x.shape[0] * x.shape[1] + 1]
    assert torch.equal(x, before)


def test_small_inputs_are_not_lost_in_a_large_sum() -> None:
    """float32 keeps 24 bits: 2^24 and one more is 2^24."""
    recorder = Recorder()
    recorder.add("a", torch.tensor([[4096.0]]))
    recorder.add("a", torch.ones(1000, 1))
    assert recorder.matrix("").entries["a"].squares.tolist() == [[4096.0**2 + 1000]]


# --- which runs count ---


def test_quantized_layers_are_recorded_too(imatrix: Command, demo_models: Path) -> None:
    plain = imatrix.record("full_precision")
    quantized = imatrix.record("quantized", "--set", "Quantize.format=gguf-q8-0")
    assert quantized.entries.keys() == plain.entries.keys()
    for name in plain.entries:
        a, b = plain.find(name), quantized.find(name)
        assert a is not None
        assert b is not None
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99
    assert any(not torch.equal(plain.entries[n].squares, quantized.entries[n].squares) for n in plain.entries)


def test_weights_stored_in_8_bits_are_recorded_too(imatrix: Command) -> None:
    plain = imatrix.record("full_precision")
    stored = imatrix.record("full_precision", "--set", "Model.weight_dtype=fp8_e4m3fn")
    assert {n: s.counts.tolist() for n, s in stored.entries.items()} == {
        n: s.counts.tolist() for n, s in plain.entries.items()
    }


def test_all_samplers_of_a_workflow_add_up(imatrix: Command) -> None:
    """side_by_side samples with the model at full precision and quantized."""
    full = imatrix.record("full_precision")
    quantized = imatrix.record("quantized", "--set", "Quantize.format=gguf-q8-0")
    both = imatrix.record("side_by_side", "--set", "Quantize.format=gguf-q8-0")
    assert both.chunk_count == full.chunk_count + quantized.chunk_count == 4
    for name, sums in both.entries.items():
        wanted = full.entries[name].squares + quantized.entries[name].squares
        assert torch.allclose(sums.squares, wanted, rtol=1e-6)  # each file rounds to float32
        assert sums.counts == full.entries[name].counts + quantized.entries[name].counts


def test_results_of_an_earlier_run_hide_nothing(imatrix: Command) -> None:
    first = imatrix("full_precision", to="a.gguf").read_bytes()
    assert imatrix("full_precision", to="b.gguf").read_bytes() == first


def test_twins_run_once_and_count_once(imatrix: Command) -> None:
    graph = json.loads((WORKFLOWS / "full_precision.json").read_text())
    once = imatrix.record(graph)
    for old, new in (("11", "31"), ("12", "32"), ("13", "33")):
        graph[new] = json.loads(json.dumps(graph[old]))
    graph["32"]["inputs"]["samples"] = ["31", 0]
    graph["33"]["inputs"]["images"] = ["32", 0]
    assert imatrix.record(graph).entries[QKV].counts == once.entries[QKV].counts


def test_models_are_left_without_hooks(demo_models: Path, tmp_path: Path) -> None:
    recorder, model = Recorder(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with recorder.watch(model, {"a.weight": model[0]}):
        model(torch.ones(3, 4))
    with pytest.raises(WorkflowError), recorder.watch(model, {"a.weight": model[0]}):
        model(torch.ones(3, 5))
    model(torch.ones(3, 4))
    assert not any(m._forward_pre_hooks for m in model.modules())


# --- names ---


def test_text_encoder(imatrix: Command, demo_models: Path) -> None:
    matrix = imatrix.record("full_precision", "--component", "clip_l")
    names = set(read_checkpoint(demo_models / "text_encoders" / "digits_clip.safetensors").tensors)
    assert {n for n in names if re.search(r"(_proj|fc\d)\.weight$", n)} == set(matrix.entries)
    assert matrix.chunk_count == 2  # the prompt and the negative prompt
    both = imatrix.record("full_precision", "--component", "clip_l", "--component", "transformer")
    assert {QKV, *matrix.entries} < set(both.entries)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_names_of_t5_are_those_of_llama_cpp(quantized: bool) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=9, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model: Any = T5EncoderModel(config).eval()
    if quantized:
        model = with_layers(model, quantize_linears(model, QuantSpec("gguf-q8-0"))[0])
    layers = encoder_layers("t5xxl", model)
    attention, mlp = ("attn_q", "attn_k", "attn_v", "attn_o"), ("ffn_gate", "ffn_up", "ffn_down")
    assert set(layers) == {f"enc.blk.{i}.{n}.weight" for i in range(2) for n in (*attention, *mlp)}
    block = model.encoder.block[1]
    assert layers["enc.blk.1.attn_v.weight"] is block.layer[0].SelfAttention.v
    assert layers["enc.blk.1.ffn_down.weight"] is block.layer[1].DenseReluDense.wo
    assert isinstance(block.layer[0].SelfAttention.v, QuantizedLinear) is quantized


# --- merging ---


def test_runs_add_up_in_one_file(imatrix: Command) -> None:
    seven = imatrix.record("full_precision", to="a.gguf")
    two = imatrix.record("full_precision", "--set", "Prompt.text=a two", to="b.gguf")
    both = imatrix.record("full_precision", "--set", "Prompt.text=a two", "--merge", str(imatrix.folder / "a.gguf"))
    assert both.datasets == ("workflow.json", "workflow.json --set Prompt.text=a two")
    assert both.chunk_count == 4
    for name, sums in both.entries.items():
        assert torch.allclose(sums.squares, seven.entries[name].squares + two.entries[name].squares, rtol=1e-6)
        assert sums.counts == seven.entries[name].counts + two.entries[name].counts


def test_a_file_to_merge_is_read_before_the_run(imatrix: Command) -> None:
    (imatrix.folder / "other.gguf").write_bytes(b"GGUF and no more")
    imatrix("full_precision", "--merge", str(imatrix.folder / "other.gguf"), code=2)
    imatrix.refused("FileError: other.gguf: ")
    assert "KSampler" not in imatrix.err


def test_a_file_that_counts_calls_is_refused_before_the_run(imatrix: Command) -> None:
    name = b"a.weight"
    entry = struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 2.0)
    (imatrix.folder / "old.dat").write_bytes(entry)
    imatrix("full_precision", "--merge", str(imatrix.folder / "old.dat"), code=2)
    imatrix.refused("FileError: Importance matrices from before GGUF (.dat) count calls")
    assert "KSampler" not in imatrix.err
    assert sorted(p.name for p in imatrix.folder.iterdir()) == ["old.dat", "workflow.json"]


def test_what_was_recorded_is_not_lost_where_the_sizes_differ(imatrix: Command) -> None:
    other = Imatrix({QKV: Sums(torch.ones(1, 3, dtype=torch.float64), torch.tensor([1]))}, ("other",), 1)
    write_imatrix(imatrix.folder / "other.gguf", other)
    target = imatrix("full_precision", "--merge", str(imatrix.folder / "other.gguf"), code=2)
    imatrix.refused(f"FileError: {QKV!r}: importance matrices of different sizes")
    alone = imatrix.folder / "a.recorded.gguf"
    assert f"What this run recorded is in {alone}, by itself." in imatrix.err
    assert not target.exists()
    assert read_imatrix(alone).entries.keys() > {QKV}


def test_nothing_recorded() -> None:
    assert describe(Recorder().matrix("a"), ["a.weight"]).splitlines() == [
        "0 weights, 0 model calls",
        "No input reached 1 weights, such as a.weight: they are left out.",
    ]


# --- what it is for ---


@pytest.mark.parametrize("kind", ["Q2_K", "IQ3_XXS", "IQ2_XS"])
def test_columns_that_matter_are_rounded_better(imatrix: Command, demo_models: Path, kind: str) -> None:
    """Judged on another prompt and seed than the matrix was recorded on."""
    matrix = imatrix.record("full_precision")
    judge = imatrix.record("full_precision", "--set", "Prompt.text=a two", "--set", "Sampler.seed=1", to="b.gguf")
    name, spec = "double_blocks.1.img_mlp.0.weight", QuantSpec(format_id(kind))
    w, importance, judged = file_weights(demo_models)[name].float(), matrix.find(name), judge.find(name)
    assert importance is not None
    assert judged is not None

    def lost(given: Tensor | None) -> float:
        weight, _ = quantize_tensor(name, w, spec, given)
        return float((judged * (require(spec.format_id).dequantize(weight, torch.float32) - w) ** 2).sum())

    assert lost(importance) < 0.9 * lost(None)


# --- refusals: no file is left behind ---


def only_the_workflow(folder: Path) -> bool:
    return [p.name for p in folder.iterdir()] == ["workflow.json"]


@pytest.mark.parametrize(
    ("arguments", "to", "said"),
    [
        ([], "a.dat", ["FileError: --out: ", "is no .gguf file."]),
        ([], "workflow.json/a.gguf", ["FileError: --out: cannot write in "]),
        (["--set", "Sampler.stepz=4"], "a.gguf", ["Did you mean steps"]),
        (["--models", "/no/such/folder"], "a.gguf", ["FileError: --models: '/no/such/folder' is not a folder."]),
        (["--merge", "/no/such.gguf"], "a.gguf", ["FileError: /no/such.gguf: cannot be read"]),
    ],
    ids=["suffix", "folder", "override", "models", "merge"],
)
def test_bad_arguments(imatrix: Command, arguments: list[str], to: str, said: list[str]) -> None:
    imatrix("full_precision", *arguments, to=to, code=2)
    imatrix.refused(*said)
    assert only_the_workflow(imatrix.folder)


def test_what_is_there_is_not_lost(imatrix: Command) -> None:
    target = imatrix.folder / "a.gguf"
    write_imatrix(target, Imatrix({"a": Sums(torch.ones(1, 4, dtype=torch.float64), torch.tensor([1]))}, ("a",), 1))
    before = target.read_bytes()
    imatrix("full_precision", code=2)
    imatrix.refused("FileError: --out: ", "is there already.")
    assert f"--merge {target} adds to it, --overwrite replaces it" in imatrix.err
    assert "KSampler" not in imatrix.err
    assert target.read_bytes() == before
    assert "a" not in imatrix.record("full_precision").entries


@pytest.mark.parametrize("arguments", [[], ["--overwrite"]])
def test_a_model_is_never_overwritten(imatrix: Command, demo_models: Path, arguments: list[str]) -> None:
    target = imatrix.folder / "a.gguf"
    model = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert main(["convert", str(model), str(target), "--type", "Q8_0"]) == 0
    before = target.read_bytes()
    imatrix("full_precision", *arguments, code=2)
    imatrix.refused("FileError: --out: ", "is there already, and no importance matrix")
    assert target.read_bytes() == before


def test_a_workflow_that_samples_nothing(imatrix: Command) -> None:
    imatrix("full_precision", "--set", "Sampler.denoise=0", code=2)
    imatrix.refused("transformer did not run, so there is nothing to record of it (what ran: clip_l).")
    assert only_the_workflow(imatrix.folder)


def test_a_component_that_the_workflow_does_not_have(imatrix: Command) -> None:
    imatrix("full_precision", "--component", "t5xxl", code=2)
    imatrix.refused("t5xxl did not run", "clip_l, transformer")
    assert only_the_workflow(imatrix.folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers(value: float) -> None:
    model = nn.Linear(4, 4)
    recorder = Recorder()
    with (
        pytest.raises(WorkflowError, match=r"^'a\.weight': nan or inf in the input"),
        recorder.watch(model, {"a.weight": model}),
    ):
        model(torch.tensor([[1.0, value, 2.0, 3.0]]))


def test_models_of_different_sizes_under_one_name() -> None:
    recorder = Recorder()
    recorder.add("a.weight", torch.ones(2, 4))
    with pytest.raises(WorkflowError, match=r"^'a\.weight': an input of 8 columns after one of 4"):
        recorder.add("a.weight", torch.ones(2, 8))


def test_weights_that_no_input_reached_are_named(imatrix: Command) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    recorder = Recorder()
    with recorder.watch(model, {f"{n}.weight": m for n, m in model.items()}):
        model["a"](torch.ones(1, 4))
    assert recorder.idle == {"b.weight"}
    assert list(recorder.matrix("").entries) == ["a.weight"]


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
def test_ctrl_c_in_mid_sampling_leaves_the_old_file(tmp_path: Path, demo_models: Path) -> None:
    out = tmp_path / "out" / "a.gguf"
    out.parent.mkdir()
    write_imatrix(out, Imatrix({"a": Sums(torch.ones(1, 4, dtype=torch.float64), torch.tensor([1]))}, ("a",), 1))
    before = out.read_bytes()
    arguments = ["imatrix", str(WORKFLOWS / "full_precision.json"), "--set", "Sampler.steps=10000", "--out", str(out)]
    arguments += ["--overwrite"]
    process = subprocess.Popen(
        [sys.executable, "-m", "quantwire.cli", *arguments, "--models", str(demo_models)], cwd=tmp_path,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        heard = []
        for line in process.stderr:  # the sampler starts when all that it needs is done
            heard.append(line)
            if "EmptySD3LatentImage" in line:
                break
        process.send_signal(signal.SIGINT)
        heard += process.stderr.read().splitlines(keepends=True)
        assert process.wait(timeout=60) == 130, "".join(heard)
    finally:
        process.kill()
        process.wait()
    assert "Interrupted." in "".join(heard)
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["a.gguf"]
