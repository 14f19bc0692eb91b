"""What importing the pack costs, and which way its imports point."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import quantwire

ROOT = Path(quantwire.__file__).parent
HEAVY = ["bitsandbytes", "optimum", "diffusers", "transformers", "gguf", "accelerate"]
FOLDERS = ("quantizers", "nodes", "hosts")
SOURCES = [ROOT / "__init__.py", ROOT / "cli.py", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py")))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import statement, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from ((node.level, f"{base}.{alias.name}".strip(".")) for alias in node.names)


def resolved(path: Path, level: int, name: str) -> str:
    """Dotted name from the root of the pack."""
    package = path.relative_to(ROOT).parts[:-1]
    return ".".join((*package[: len(package) - level + 1], name))


@pytest.mark.parametrize("statement", ["import quantwire", "import quantwire; quantwire.NODE_CLASS_MAPPINGS"])
def test_importing_the_pack_loads_no_library(statement: str) -> None:
    code = f"import json, sys; {statement}; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(run.stdout)
    assert "quantwire" in modules
    assert [m for m in HEAVY if m in modules] == []


def relative_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "quantizers")], ids=relative_id)
def test_quantizers_know_neither_hosts_nor_nodes(path: Path) -> None:
    for level, name in imports(path):
        if level:
            assert resolved(path, level, name).partition(".")[0] == "quantizers", name
        else:
            assert name.partition(".")[0] not in ("diffusers", "transformers", "accelerate", "comfy", "folder_paths")


@pytest.mark.parametrize("path", SOURCES, ids=relative_id)
def test_imports_inside_the_pack_are_relative(path: Path) -> None:
    own = {"quantwire", "cli", *FOLDERS}
    assert [name for level, name in imports(path) if not level and name.partition(".")[0] in own] == []
