"""Write the shipped workflows in both forms: `api/NAME.json` (POST /prompt) and `NAME.json` (the editor's).

    python -m quantwire.workflows.build

A workflow is described once (`demo.py`, `templates.py`, `more_templates.py`). A test checks that the files in the
repository are what this writes. The pictures beside them are made by `thumbnails.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .demo import DEMO
from .describe import Workflow
from .editor_form import editor_form, widgets_of
from .more_templates import OTHERS
from .templates import IMAGES

FOLDER = Path(__file__).parent
TEMPLATES = (*IMAGES, *OTHERS)
WORKFLOWS = (*DEMO, *TEMPLATES)


def api_form(workflow: Workflow) -> dict[str, Any]:
    """Every widget's value and every link, as the editor exports it."""
    out: dict[str, Any] = {}
    for node_id, node in workflow.nodes.items():
        links = {name: list(value) for name, value in node.inputs.items() if isinstance(value, tuple)}
        values = {found.name: value for found, value in widgets_of(node)}
        out[node_id] = {"class_type": node.kind, "inputs": values | links, "_meta": {"title": node.title}}
    return out


def rendered() -> dict[Path, str]:
    """Path -> text of every file."""
    files: dict[Path, str] = {}
    for workflow in WORKFLOWS:
        files[FOLDER / "api" / f"{workflow.name}.json"] = json.dumps(api_form(workflow), indent=2) + "\n"
        files[FOLDER / f"{workflow.name}.json"] = json.dumps(editor_form(workflow), indent=2) + "\n"
    return files


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
