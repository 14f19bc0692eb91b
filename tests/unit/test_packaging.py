"""The files that install the pack agree with each other and with the folders that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from quantwire.quantizers.formats import BACKENDS, Backend

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reading pyproject.toml needs Python 3.11 or tomli")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = ("commands", "nodes", "hosts", "quantizers", "workflows")


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~;\s]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}


def lines(path: str) -> list[str]:
    text = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in text if line.strip() and not line.startswith("#")]


def test_requirements_txt_is_the_base_dependencies() -> None:
    assert sorted(lines("requirements.txt")) == sorted(PROJECT["project"]["dependencies"])


def test_installing_the_pack_moves_neither_torch_nor_the_front_end() -> None:
    forbidden = {"torch", "torchvision", "comfy-kitchen", "comfyui-frontend-package", "transformers", "diffusers"}
    assert not names(PROJECT["project"]["dependencies"]) & forbidden


def test_every_dependency_is_pinned_by_the_constraints() -> None:
    pinned = names(lines("constraints.txt"))
    wanted = names(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted |= names(extra)
    assert wanted <= pinned


def test_every_library_is_in_an_extra_of_its_licence() -> None:
    """`pip install quantwire[backends]` brings no copyleft library unasked."""
    extras = {name: names(wanted) for name, wanted in PROJECT["project"]["optional-dependencies"].items()}
    free = {b.package for b in BACKENDS if b.package and not b.licence.startswith("GPL")}
    free |= {package for b in BACKENDS for package, licence in b.also.items() if not licence.startswith("GPL")}
    assert extras["backends"] == free
    for backend in BACKENDS:
        if backend.licence.startswith("GPL"):
            assert extras[backend.name] == {backend.package}
            assert [e for e, held in extras.items() if backend.package in held] == [backend.name]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_the_readme_names_every_library_and_its_licence(backend: Backend) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    library = dict(rows)[backend.name]
    licence = backend.licence.removesuffix("-only")
    assert library.startswith(f"{backend.package} ({licence}" if backend.package else "torch alone")


def test_constraints_pin_exactly_and_torch_is_the_one_that_make_installs() -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in lines("constraints.txt"))
    version = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert version
    assert f"torch=={version[1]}" in lines("constraints.txt")


def test_every_package_folder_is_packaged() -> None:
    folders = {p.parent.relative_to(ROOT) for top in SOURCES for p in (ROOT / top).rglob("__init__.py")}
    expected = {"quantwire"} | {"quantwire." + ".".join(f.parts) for f in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_ci_runs_lint_types_the_test_command_of_the_readme_the_slow_tests_and_the_probes() -> None:
    commands = [line for line in lines(".ci/run") if line.startswith("make ")]
    assert commands == ["make lint", "make types", "make test", "make test-slow", "make probe"]
    assert "`make test`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_placeholder_is_left_in_what_users_read() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, text=True, capture_output=True, check=True)
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.findall(r"@[A-Z]+@|^[A-Z]+_?[A-Z]+$|TODO|FIXME", text, re.M), name


@pytest.mark.slow
def test_a_wheel_holds_modules_and_workflows_and_no_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    for name in files:  # a copy, because setuptools writes build folders into the source tree
        if not name.startswith("demo/models/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, str(source)], check=True)
    import zipfile

    (wheel,) = tmp_path.glob("quantwire-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert "quantwire/quantizers/registry.py" in held
    assert "quantwire/workflows/api/quantized.json" in held
    web = {"docs/QuantConfig.md", "docs/FitModel/zh.md", "docs/img/FitModel.png", "docs/img/zh/FitModel.png"}
    assert {f"quantwire/web/{name}" for name in (*web, "quantwire.js", "lib/words.js")} <= set(held)
    assert {f"quantwire/locales/{k}/{n}.json" for k in ("en", "zh") for n in ("main", "nodeDefs")} <= set(held)
    assert {"quantwire/hosts/lint/core_nodes.txt", "quantwire/hosts/lint/pack_nodes.txt"} <= set(held)
    assert not [n for n in held if n.endswith(".safetensors") or "/tests/" in n]
