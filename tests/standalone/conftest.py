"""One `quantwire run` in this process on the demo models, and what it said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantwire.cli import main
from server_process import server_process  # noqa: F401 (one server for the modules that share it)

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
ERROR = re.compile(r"[A-Z]\w*(Error|Workflow|Failed|Conflict|Unavailable): ")


class Outcome:
    """What one command did: exit code, standard output and error, files in the output folder."""

    def __init__(self, code: int, out: str, err: str, folder: Path) -> None:
        self.code, self.out, self.err = code, out, err
        self.files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    @property
    def first(self) -> str:
        """The first line that is an error message: lines before it tell of nodes that ran."""
        return next(line for line in self.err.splitlines() if ERROR.match(line))

    def assert_refused(self, *said: str, code: int = 2) -> None:
        """The exit code, all of `said` in the first line, and neither a traceback nor a file."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        for word in said:
            assert word in self.first, self.err
        assert self.files == []


@pytest.fixture
def models(demo_models: Path, tmp_path: Path) -> Path:
    """A model folder of the test's own; the demo models are looked up after it."""
    for name in ("diffusion_models", "text_encoders", "vae"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def quantwire(
    tmp_path: Path, models: Path, demo_models: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """quantwire("full_precision" or a graph, *arguments): one `quantwire run` in this process, one step of sampling."""

    def run(workflow: str | dict[str, Any], *arguments: str, steps: int = 1) -> Outcome:
        graph = read_workflow(workflow) if isinstance(workflow, str) else workflow
        for node in graph.values():
            if node["class_type"] == "KSampler" and node["inputs"].get("steps") == 8:
                node["inputs"]["steps"] = steps
        path = tmp_path / "workflow.json"
        path.write_text(json.dumps(graph), encoding="utf-8")
        folders = ["--models", str(models), "--models", str(demo_models)]
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        capsys.readouterr()
        code = main(["run", str(path), *folders, *out, *arguments])
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err, tmp_path / "out")

    return run


@pytest.fixture
def api() -> Callable[[str], dict[str, Any]]:
    """A shipped workflow in API form, by name."""
    return read_workflow


@pytest.fixture
def outcome() -> type[Outcome]:
    return Outcome


def read_workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
