"""Reference page of the JSON files that the pack writes, from the schemas in docs/schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"


def pages() -> dict[str, str | bytes]:
    """Path under docs/ -> Markdown."""
    parts = [
        "# JSON schemas",
        "",
        "Files that `quantwire` writes for other programs. A test checks real files against these schemas.",
        "",
    ]
    for path in sorted(SCHEMAS.glob("*.schema.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## {path.name.removesuffix('.schema.json')}.json", "", schema.get("description", ""), ""]
        parts += [f"The whole schema: [{path.name}](../schemas/{path.name}).", ""]
        parts += ["| key | type | required | |", "| --- | --- | --- | --- |", *_rows(schema, "", schema), ""]
    return {"reference/schemas.md": "\n".join(parts)}


def _rows(schema: dict[str, Any], prefix: str, root: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    for key, given in schema.get("properties", {}).items():
        value = _resolved(given, root)
        name = f"{prefix}{key}"
        meaning = str(given.get("description", value.get("description", ""))).replace("|", "\\|")
        yield f"| `{name}` | {_type(value, root)} | {'yes' if key in required else ''} | {meaning} |"
        items = _resolved(value.get("items", {}), root)
        yield from _rows(value, f"{name}.", root)
        yield from _rows(items, f"{name}[].", root)


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        found: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def _type(schema: dict[str, Any], root: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(v)}`" for v in schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_type(_resolved(s, root), root) for s in schema[union])
    kind = schema.get("type", "any")
    names = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if kind == "array" and "items" in schema:
        return f"array of {_type(_resolved(schema['items'], root), root)}"
    return names
