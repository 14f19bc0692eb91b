"""What the registry of ComfyUI reads and publishes: metadata by its rules, and the pack run from its archive.

The rules are those of comfy-cli (comfy_cli/registry/config_parser.py and comfy_cli/file_utils.py at e805d26, August
2026) and of https://docs.comfy.org/registry/specifications; comfy-cli itself is GPL-3.0 and not installed here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reading pyproject.toml needs Python 3.11 or tomli")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMFY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]
SYSTEMS = ("Microsoft", "POSIX", "MacOS", "OS Independent")
ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}
# 14.4 MB when this was written, 12.4 of them the demo model.
MOST_BYTES = 18_000_000
# What the host brings; installing the pack must not move any of it.
HOST_PACKAGES = {
    *("torch", "torchvision", "torchaudio", "torchsde", "triton", "comfy-kitchen", "comfy-aimdo", "transformers"),
    *("comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs", "diffusers", "aiohttp"),
}


def refused_classifiers(classifiers: list[str]) -> list[str]:
    """Those that void what the registry shows of systems or accelerators."""
    systems = [c for c in classifiers if c.startswith("Operating System :: ")]
    devices = [c for c in classifiers if c.startswith("Environment ::")]
    return [
        *(c for c in systems if not c.removeprefix("Operating System :: ").startswith(SYSTEMS)),
        *(c for c in devices if c.removeprefix("Environment :: ") not in ACCELERATORS),
    ]


def archived() -> list[str]:
    """The files that comfy-cli would put into the archive, of the tree as it would be committed now."""
    from pathspec import PathSpec

    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the name that comfy-cli uses for this syntax
        ignored = PathSpec.from_lines("gitwildmatch", patterns)
    return [name for name in tracked if not ignored.match_file(name) and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archived():
            packed.write(ROOT / name, name)
    return path


@pytest.fixture(scope="module")
def installed(archive: Path) -> Path:
    """The archive unpacked where ComfyUI-Manager puts it."""
    folder = archive.parent / "custom_nodes" / "quantwire"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def run_in(folder: Path, code: str) -> dict[str, Any]:
    """Run Python beside an installed pack; the code prints JSON last."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, cwd=folder.parents[1], env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_registry_accepts_name_version_publisher_and_host() -> None:
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9]*([._-][a-zA-Z0-9]+)*", PROJECT["name"])
    assert len(PROJECT["name"]) < 100
    assert "comfy" not in PROJECT["name"].lower()
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", PROJECT["version"])
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", COMFY["PublisherId"])
    assert COMFY["DisplayName"]
    for part in COMFY["requires-comfyui"].split(","):
        assert re.fullmatch(r"(==|>=|<=|!=|~=|>|<|=)\s*\d+\.\d+\.\d+(-[a-zA-Z0-9]+)?", part.strip())


def test_the_host_that_is_required_is_the_one_that_the_readme_names() -> None:
    version = re.search(r"Restart ComfyUI \((\d+\.\d+) or newer\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert version
    assert COMFY["requires-comfyui"] == f">={version[1]}.0"


def test_classifiers_are_ones_that_the_registry_knows() -> None:
    assert refused_classifiers(PROJECT["classifiers"]) == []
    assert any(c.startswith("Operating System :: ") for c in PROJECT["classifiers"])


@pytest.mark.parametrize("wrong", ["Operating System :: Linux", "Environment :: GPU", "Environment :: Console"])
def test_a_classifier_that_voids_the_list_is_noticed(wrong: str) -> None:
    assert refused_classifiers([*PROJECT["classifiers"], wrong]) == [wrong]


def test_addresses_are_of_one_repository_and_of_files_that_exist() -> None:
    """What is served from the repository is in it, so that no address is dead once it is published."""
    urls = PROJECT["urls"]
    repository = urls["Repository"]
    assert re.fullmatch(rf"https://github\.com/{COMFY['PublisherId']}/{PROJECT['name']}", repository)
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    files = [COMFY["Icon"].removeprefix(raw)]
    files += [urls[key].removeprefix(f"{repository}/blob/main/") for key in ("Documentation", "Changelog")]
    assert all((ROOT / name).is_file() for name in files), files
    assert urls["Issues"] == f"{repository}/issues"


def test_the_publisher_confirms_one_place() -> None:
    """The address is an assumption until then: marked in pyproject.toml, and in no other file that users get."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.urls]")[0].splitlines()
    assert any("TO BE CONFIRMED BY THE PUBLISHER BEFORE PUBLISHING" in line for line in lines[-4:])
    page = (ROOT / "docs" / "how-to" / "publish.md").read_text(encoding="utf-8")
    assert "confirm them before you publish" in page
    address = PROJECT["urls"]["Repository"].partition("//")[2].encode()
    assert address.decode() in page
    assert [name for name in archived() if address in (ROOT / name).read_bytes()] == ["pyproject.toml"]


def test_the_demo_model_is_written_into_a_comfyui_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any other folder one line is said, and nothing is written there."""
    program = ROOT / "demo" / "export_comfyui.py"
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(program), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"export_comfyui.py: {tmp_path} is no ComfyUI folder: comfy/sd1_tokenizer/vocab.json is not in it. "
        "Give the folder that holds ComfyUI's main.py.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_icon_is_a_picture_that_the_registry_takes() -> None:
    """SVG, PNG, JPG or GIF of at most 800 x 400; an SVG from elsewhere must not run or load anything."""
    path = ROOT / "docs" / "icon.svg"
    assert COMFY["Icon"].endswith(path.name)
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (int(root.get("width", 0)), int(root.get("height", 0))) == (400, 400)
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names <= {"svg", "rect", "path", "circle"}


def test_the_licence_is_a_known_one_whose_text_is_there() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_web_files_are_registered_once() -> None:
    """`[tool.comfy] web` would register what WEB_DIRECTORY serves a second time."""
    assert "web" not in COMFY
    assert COMFY["includes"] == []  # everything that is needed is tracked; `includes` would override .comfyignore


def test_the_archive_holds_what_users_need_and_nothing_else(archive: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    needed = {"__init__.py", "cli.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md"}
    assert needed <= set(names)
    shipped = [*(ROOT / "web").rglob("*"), *(ROOT / "workflows").rglob("*"), *(ROOT / "locales").rglob("*")]
    wanted = {p.relative_to(ROOT).as_posix() for p in shipped if p.is_file() and "__pycache__" not in p.parts}
    assert wanted <= set(names)
    assert {n.split("/")[0] for n in names if "/" in n} <= {
        *("commands", "demo", "hosts", "locales", "nodes", "quantizers", "web", "workflows"),
    }
    assert not [n for n in names if n.startswith((".", "tests/", "benchmarks/", "docs/")) or n.endswith(".pyc")]


def test_the_archive_is_small(archive: Path) -> None:
    assert archive.stat().st_size < MOST_BYTES


def test_the_pack_loads_from_the_archive_as_the_host_loads_it(installed: Path) -> None:
    """By its path, under its path as module name, with the host's own `nodes` on sys.path."""
    (installed.parents[1] / "nodes.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    found = run_in(
        installed,
        """
        import importlib.util, json, os, sys
        folder = sys.argv[1]
        sys.modules["quantwire"] = None  # a pack that imports itself by name would find another copy
        spec = importlib.util.spec_from_file_location(folder, os.path.join(folder, "__init__.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[folder] = module
        spec.loader.exec_module(module)
        inputs = {name: list(node.INPUT_TYPES()) for name, node in module.NODE_CLASS_MAPPINGS.items()}
        here = [m.__file__ for n, m in sys.modules.items() if n.startswith(folder) and getattr(m, "__file__", None)]
        print(json.dumps({
            "nodes": inputs, "names": sorted(module.NODE_DISPLAY_NAME_MAPPINGS),
            "web": os.path.isdir(os.path.join(folder, module.WEB_DIRECTORY)),
            "outside": [f for f in here if not f.startswith(folder)],
        }))
        """,
    )
    from quantwire.nodes import NODE_CLASS_MAPPINGS

    assert list(found["nodes"]) == list(NODE_CLASS_MAPPINGS)
    assert all("required" in groups or "optional" in groups for groups in found["nodes"].values())
    assert found["names"] == sorted(NODE_CLASS_MAPPINGS)
    assert found["web"]
    assert found["outside"] == []


COMMANDS = """
    import json, pathlib, sys
    folder = pathlib.Path(sys.argv[1])
    sys.path.insert(0, str(folder.parent))
    import quantwire
    from quantwire.cli import main
    out = folder.parents[1] / "out"
    code = main([str(folder / a[1:]) if a.startswith("@") else a.replace("OUT", str(out)) for a in ARGUMENTS])
    print()
    print(json.dumps({"code": code, "file": quantwire.__file__, "images": len(list(out.rglob("*.png")))}))
"""


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "@demo/models/diffusion_models/digits_flux.safetensors"), ("lint", "@workflows/full_precision.json")],
    ids=lambda a: a[0],
)
def test_a_command_runs_from_the_archive(installed: Path, arguments: tuple[str, ...]) -> None:
    found = run_in(installed, textwrap.dedent(COMMANDS).replace("ARGUMENTS", repr(list(arguments))))
    assert Path(found["file"]).is_relative_to(installed)
    assert found["code"] == 0


@pytest.mark.slow
def test_the_demo_workflow_runs_from_the_archive(installed: Path) -> None:
    arguments = ["run", "@workflows/api/quantized.json", "--set", "Sampler.steps=1", "--out", "OUT"]
    found = run_in(installed, textwrap.dedent(COMMANDS).replace("ARGUMENTS", repr(arguments)))
    assert Path(found["file"]).is_relative_to(installed)
    assert (found["code"], found["images"]) == (0, 1)


def closure(requirements: list[str]) -> set[str]:
    """Names of the packages that these bring, read from the metadata of those installed here."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [Requirement(r) for r in requirements]
    while todo:
        wanted = todo.pop()
        name = wanted.name.lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)
    return found


def test_requirements_bring_nothing_that_the_host_brings() -> None:
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert closure(wanted) == {"numpy", "safetensors"}
    assert closure([*wanted, "diffusers"]) & HOST_PACKAGES == {"diffusers"}  # the walk does see what packages bring


@pytest.mark.slow
@pytest.mark.parametrize("python", ["this", "ComfyUI's"])
def test_pip_installs_nothing_into_a_host(python: str) -> None:
    """pip's own resolver, without a package index: what the host has is enough, and stays as it is."""
    interpreter = sys.executable if python == "this" else os.environ.get("COMFYUI_PYTHON")
    if interpreter is None:
        pytest.skip("COMFYUI_PYTHON is not set: no Python of a ComfyUI to ask")
    command = [interpreter, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", "--report", "-"]
    command += ["--disable-pip-version-check", "--requirement", str(ROOT / "requirements.txt")]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["install"] == []
