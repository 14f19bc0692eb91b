"""MkDocs hook: the reference pages, made from the code each time the site is built, so that none can be out of date.

`mkdocs.yml` lists only what is written by hand; the pages made here are added to its navigation under Reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import site_commands
import site_nodes
import site_routes
import site_schemas

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

SECTION = "Reference"


def sections() -> dict[str, dict[str, str | bytes]]:
    """Title of a group of pages -> path under docs/ -> content. The first page of a group leads to the others."""
    return {
        "Nodes": site_nodes.pages(),
        "Commands": site_commands.pages(),
        "Server routes": site_routes.pages(),
        "JSON schemas": site_schemas.pages(),
    }


def on_config(config: MkDocsConfig) -> None:
    """Put the generated pages into the navigation, behind what is written by hand in the same section."""
    made = sections()
    config.extra["generated"] = made
    (found,) = (item[SECTION] for item in config.nav or [] if isinstance(item, dict) and SECTION in item)
    entries: list[Any] = found
    for title, pages in made.items():
        entries.append({title: [path for path in pages if path.endswith(".md")]})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for pages in config.extra["generated"].values():
        for path, content in pages.items():
            files.append(File.generated(config, path, content=content))
    return files
