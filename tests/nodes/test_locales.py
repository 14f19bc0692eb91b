"""`locales/`: complete, in step with the nodes and the web extension, and written in the language that they are for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from quantwire.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, locale_stubs

ROOT = Path(__file__).resolve().parents[2]
ZH = dict(locale_stubs.flat(locale_stubs.read("zh")))
# Words of Latin letters that Chinese users of ComfyUI read in Latin letters too. What a node's menus offer, its ids and
# its file names are found in the nodes themselves.
PROPER = set(
    """
    ComfyUI GGUF LoRA CLIP VAE URI UNet ControlNet FLUX SD Wan Qwen Image Lumina Z LTX Video T5 wo safetensors mmproj
    bitsandbytes quanto SDNQ torchao NNCF compressed tensors fp8 diffusers checkpoint pipeline nan inf torch compile
    JSON HTML GPU NVIDIA RTX KSampler Latent SQNR PSNR SSIM FLIP GiB MiB GB MB llama cpp quantwire run formats convert
    imatrix scales rules keep re checkpoints unet cfg nvfp4 comfy Q K IQ NF4 dB A B
    """.split()  # noqa: SIM905
)


def choices() -> set[str]:
    """What stands in menus: the editor does not translate it, and texts refer to it as it stands there."""
    found: set[str] = set()
    for node in NODE_CLASS_MAPPINGS.values():
        types = node.INPUT_TYPES()  # type: ignore[attr-defined]
        for group in types.values():
            for name, spec in group.items():
                found |= {name, *(map(str, spec[0]) if isinstance(spec[0], list) else ())}
    return found


def without_names(text: str, menus: re.Pattern[str]) -> str:
    """The text without what stands in menus, technical ids, file names and layer patterns."""
    text = menus.sub(" ", text)
    text = re.sub(r"`[^`]*`", " ", text)
    return re.sub(r"[\w*.:;=/-]*[*=;/_.]+[\w*.:;=/-]*|(?<![\w-])-[a-z]+", " ", text)


def test_everything_is_there_and_in_step() -> None:
    assert locale_stubs.problems() == []
    assert set(locale_stubs.languages()) >= {"zh"}
    for language in ("en", "zh"):
        assert all((ROOT / "locales" / language / f"{name}.json").is_file() for name in locale_stubs.FILES)


def test_english_is_that_of_the_nodes() -> None:
    english = locale_stubs.english()
    nodes = english["nodeDefs"]
    assert set(nodes) == set(NODE_CLASS_MAPPINGS)
    assert {key: entry["display_name"] for key, entry in nodes.items()} == NODE_DISPLAY_NAME_MAPPINGS
    host = locale_stubs.FROM_THE_HOST
    silent = {(n, i) for n, entry in nodes.items() for i, words in entry["inputs"].items() if "tooltip" not in words}
    assert silent == host, "only what the host's own choices are in has no text here"
    assert english["settings"]
    assert english["commands"]
    assert set(english["settings"]) == {key.replace(".", "_") for key in declared_settings()}


def declared_settings() -> set[str]:
    text = (ROOT / "web" / "settings.js").read_text(encoding="utf-8")
    defaults = re.search(r"DEFAULTS = Object.freeze\(\{(.*?)\}\)", text, re.S)
    assert defaults
    return set(re.findall(r'"([\w.]+)":', defaults[1]))


def test_ids_that_the_editor_looks_up_hold_no_dots() -> None:
    """The editor replaces the dots of an id by underscores, and takes a dot for a level of the tree."""
    for name, tree in locale_stubs.english().items():
        assert not [key for key, _ in locale_stubs.flat(tree, name) if "." in key]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_holds_what_messages_are_made_of(language: str) -> None:
    """The editor compiles names, descriptions and, in older versions, tooltips as messages with these characters."""
    texts = dict(locale_stubs.flat(locale_stubs.read(language)))
    assert not [key for key, text in texts.items() if set(text) & set("{}@|")]


def test_no_english_is_left_in_chinese() -> None:
    longest_first = map(re.escape, sorted(choices(), key=len, reverse=True))
    menus = re.compile(rf"(?<![A-Za-z0-9-])({'|'.join(longest_first)})(?![A-Za-z0-9-])")
    left = {}
    for key, text in ZH.items():
        words = set(re.findall(r"[A-Za-z][A-Za-z0-9]*", without_names(text, menus))) - PROPER
        if words:
            left[key] = sorted(words)
    assert left == {}


def test_sentences_are_chinese() -> None:
    """A tooltip or a description is a sentence with Chinese words and its full stop; it is no copy of another text."""
    for key, text in ZH.items():
        if key.endswith(("/tooltip", "/description")) and key.startswith("nodeDefs/"):
            assert len(re.findall(r"[\u4e00-\u9fff]", text)) >= 3, key
            assert text.endswith("。"), key
            assert not re.search(r"[\u4e00-\u9fff][,;:!?.]", text), f"{key}: Latin punctuation behind Chinese"


def test_the_same_english_sentence_has_one_translation() -> None:
    found: dict[str, set[str]] = {}
    for key, text in locale_stubs.flat(locale_stubs.english()):
        if key in ZH and key.endswith("/tooltip") and key.startswith("nodeDefs/"):
            found.setdefault(text, set()).add(ZH[key])
    assert {text: all_ for text, all_ in found.items() if len(all_) > 1} == {}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`locales/` in a folder of its own."""
    for file in (ROOT / "locales").rglob("*.json"):
        target = tmp_path / file.relative_to(ROOT / "locales")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    monkeypatch.setattr(locale_stubs, "LOCALES", tmp_path)
    return tmp_path


def change(file: Path, *path: str, to: Any = None) -> None:
    """Set a text, or take it away."""
    data = json.loads(file.read_text(encoding="utf-8"))
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    if to is None:
        del inside[path[-1]]
    else:
        inside[path[-1]] = to
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def test_a_missing_an_empty_and_a_stale_entry_are_found(copy: Path) -> None:
    file = copy / "zh" / "nodeDefs.json"
    change(file, "LoadGGUF", "description")
    change(file, "QuantRules", "inputs", "rules", "tooltip", to=" ")
    change(file, "NoSuchNode", to={"display_name": "无"})
    change(copy / "en" / "nodeDefs.json", "FitModel", "display_name", to="Fitted")
    change(copy / "zh" / "settings.json", "quantwire_check", "name", to="别的")
    assert [line.split(" ")[:3] for line in sorted(locale_stubs.problems())] == [
        ["en:", "not", "what"],
        ["zh:", "nodeDefs/LoadGGUF/description", "is"],
        ["zh:", "nodeDefs/NoSuchNode/display_name", "is"],
        ["zh:", "nodeDefs/QuantRules/inputs/rules/tooltip", "is"],
        ["zh:", "settings/quantwire_check/name", "is"],
    ]


def test_write_keeps_translations_and_adds_stubs(copy: Path) -> None:
    before = (copy / "zh" / "nodeDefs.json").read_text(encoding="utf-8")
    change(copy / "zh" / "nodeDefs.json", "LoadGGUF", "description")
    change(copy / "zh" / "nodeDefs.json", "NoSuchNode", to={"display_name": "无"})
    locale_stubs.write()
    now = json.loads((copy / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert now["LoadGGUF"]["description"] == ""
    now["LoadGGUF"]["description"] = json.loads(before)["LoadGGUF"]["description"]
    assert now == json.loads(before)
    assert [line for line in locale_stubs.problems() if "is empty" in line]


def test_a_help_page_of_an_older_english_one_is_found_until_it_is_changed(
    copy: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = tmp_path_factory.mktemp("docs")
    for file in sorted((ROOT / "web" / "docs").rglob("*.md")):
        target = pages / file.relative_to(ROOT / "web" / "docs")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    monkeypatch.setattr(locale_stubs, "PAGES", pages)
    assert locale_stubs.problems() == []
    old = ["zh: docs/LoadGGUF translates an older page: look at what changed in web/docs/LoadGGUF.md."]
    for change_it in ("still right", "another translation"):
        with (pages / "LoadGGUF.md").open("a", encoding="utf-8") as file:
            file.write(f"\nMore, {change_it}.\n")
        locale_stubs.write()
        assert locale_stubs.problems() == old
        if change_it == "another translation":
            with (pages / "LoadGGUF" / "zh.md").open("a", encoding="utf-8") as file:
                file.write("\n还有。\n")
        locale_stubs.write(["docs/LoadGGUF"] if change_it == "still right" else [])
        assert locale_stubs.problems() == []
    (pages / "LoadGGUF" / "zh.md").unlink()
    assert locale_stubs.problems() == ["zh: docs/LoadGGUF is missing."]


def test_a_translation_of_an_older_text_is_found_until_it_is_changed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NODE_CLASS_MAPPINGS["LoadGGUF"], "DESCRIPTION", "Opens a file.")
    key = "nodeDefs/LoadGGUF/description"
    locale_stubs.write()
    assert locale_stubs.problems() == [f"zh: {key} translates an older text; it is now: Opens a file."]
    locale_stubs.write([key])
    assert locale_stubs.problems() == []
    monkeypatch.setattr(NODE_CLASS_MAPPINGS["LoadGGUF"], "DESCRIPTION", "Opens another file.")
    change(copy / "zh" / "nodeDefs.json", "LoadGGUF", "description", to="打开另一个文件。")
    locale_stubs.write()
    assert locale_stubs.problems() == []
    assert dict(locale_stubs.flat(locale_stubs.read("zh")))[key] == "打开另一个文件。"
