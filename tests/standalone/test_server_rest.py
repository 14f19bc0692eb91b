"""What the editor asks of the embedded server, in ComfyUI's own forms."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.server.app import Server, ServerConfig
from quantwire.hosts.standalone.server.definitions import definition, definitions
from quantwire.hosts.standalone.server.logs import MAX_READERS, LogLines
from quantwire.hosts.standalone.server.settings import Settings
from quantwire.hosts.standalone.server.system import translations
from quantwire.nodes import NODE_CLASS_MAPPINGS
from server_process import FRONT_END, ServerProcess

MULTIPART = {"Content-Type": "multipart/form-data; boundary=B"}


def get(server: ServerProcess, path: str) -> Any:
    answer = server.ask(path)
    assert answer.status == 200, (path, answer.body)
    return answer.json()


# --- what an editor asks at its start -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/settings", "/users", "/features", "/i18n", "/extensions", "/object_info", "/system_stats", "/embeddings",
        "/models", "/experiment/models", "/global_subgraphs", "/node_replacements", "/workflow_templates", "/queue",
        "/history", "/prompt", "/userdata?dir=workflows&recurse=true&split=false&full_info=true",
        "/userdata?dir=subgraphs&recurse=true&split=false&full_info=true", "/userdata/comfy.templates.json",
        "/v2/userdata?path=", "/internal/logs/raw", "/internal/folder_paths", "/internal/files/input",
    ],
)  # fmt: skip
def test_every_question_has_an_answer_with_and_without_api(server_process: ServerProcess, path: str):
    assert type(get(server_process, path)) is type(get(server_process, f"/api{path}"))


def test_the_page_and_its_files(server_process: ServerProcess):
    page = server_process.ask("/")
    assert (page.status, page.body.decode()) == (200, FRONT_END)
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Cache-Control"] == "no-store"
    folder = server_process.base / "front_end" / "assets"
    folder.mkdir(exist_ok=True)
    (folder / "x-1234.js").write_text("export {}")
    script = server_process.ask("/assets/x-1234.js")
    assert script.headers["Content-Type"].startswith("text/javascript")
    assert "immutable" in script.headers["Cache-Control"]
    assert server_process.ask("/assets/none.js").status == 404
    for style in ("/user.css", "/api/userdata/user.css"):
        assert server_process.ask(style).headers["Content-Type"].startswith("text/css")
    assert get(server_process, "/templates/index.json") == get(server_process, "/templates/index.zh.json") == []


def test_every_extension_that_is_listed_is_there(server_process: ServerProcess):
    listed = get(server_process, "/api/extensions")
    assert "/extensions/quantwire/quantwire.js" in listed
    for path in listed:
        answer = server_process.ask(path)
        assert (answer.status, answer.headers["Content-Type"][:15]) == (200, "text/javascript"), path
        assert answer.headers["Cache-Control"] == "no-cache"
        again = server_process.ask(path, headers={"If-None-Match": answer.headers["ETag"]})
        assert again.status == 304


def test_every_template_that_is_listed_is_a_workflow(server_process: ServerProcess):
    names = get(server_process, "/api/workflow_templates")["quantwire"]
    assert "quantized" in names
    for name in names:
        assert get(server_process, f"/api/workflow_templates/quantwire/{name}.json")["nodes"]


def test_object_info_has_the_nodes_of_the_pack_and_of_the_host(server_process: ServerProcess):
    found = get(server_process, "/object_info")
    assert {*CORE_NODES, *NODE_CLASS_MAPPINGS} <= found.keys()
    assert found["QuantizeModel"]["python_module"] == "custom_nodes.quantwire"
    assert found["QuantizeModel"]["display_name"] == "Quantize Model"
    assert found["UNETLoader"]["input"]["required"]["unet_name"][0] == ["digits_flux.safetensors"]
    assert get(server_process, "/object_info/KSampler") == {"KSampler": found["KSampler"]}
    assert get(server_process, "/object_info/NoSuchNode") == {}


def test_nodes_that_only_comfyui_runs_are_shown_and_never_replace_one_that_runs_here(tmp_path: Path):
    from quantwire.hosts import use
    from quantwire.hosts.standalone import foreign_nodes

    server = Server(ServerConfig(tmp_path))
    with use(server.host):
        found = definitions(server)
    for name, entry in foreign_nodes.definitions().items():
        if name not in server.node_classes:
            assert found[name]["category"] == entry["category"]
    for name, node_class in server.node_classes.items():
        assert found[name]["description"] == node_class.DESCRIPTION


class Odd:
    """Has what ComfyUI's contract allows and the pack's nodes do not use."""

    RETURN_TYPES = ("INT", "IMAGE")
    RETURN_NAMES = ("count", "pictures")
    OUTPUT_IS_LIST = (False, True)
    OUTPUT_TOOLTIPS = ("how many", "which")
    INPUT_IS_LIST = True
    DEPRECATED = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"b": ("INT",), "a": ("FLOAT", {"max": cls.limit})}, "hidden": {"id": "UNIQUE_ID"}}

    limit = 1.0


def test_an_entry_of_object_info(monkeypatch: pytest.MonkeyPatch):
    entry = definition("Odd", Odd, "An odd node", "nodes")
    assert entry["input_order"] == {"required": ["b", "a"], "hidden": ["id"]}
    assert entry["output_name"] == ["count", "pictures"]
    assert (entry["output_is_list"], entry["is_input_list"], entry["output_node"]) == ([False, True], True, False)
    assert entry["output_tooltips"] == ["how many", "which"]
    assert entry["deprecated"] is True
    assert "experimental" not in entry
    monkeypatch.setattr(Odd, "limit", float("inf"))
    with pytest.raises(ValueError, match="JSON compliant"):  # such a node is left out, the others are shown
        definition("Odd", Odd, None, "nodes")


def test_help_pages_of_the_hosts_own_nodes(server_process: ServerProcess):
    page = server_process.ask("/docs/KSampler/zh.md")
    assert page.headers["Content-Type"].startswith("text/markdown")
    assert "| steps | INT | 20 | Number of steps. |" in page.body.decode()
    assert server_process.ask("/docs/NoSuchNode/en.md").status == 404
    assert server_process.ask("/extensions/quantwire/docs/QuantizeModel.md").status == 200


def test_system_stats(server_process: ServerProcess):
    found = get(server_process, "/system_stats")
    assert 0 < found["system"]["ram_free"] <= found["system"]["ram_total"]
    device = found["devices"][-1]
    assert (device["type"], device["index"]) == ("cpu", 0)
    assert 0 < device["vram_free"] <= device["vram_total"]
    assert str(server_process.base) not in json.dumps(found)


def test_the_log_reaches_the_panel(server_process: ServerProcess):
    server_process.ask("/api/queue%0Aforged", headers={"Origin": "http://evil.example"})
    said = get(server_process, "/internal/logs")
    assert "evil.example" in said
    assert "\nforged" not in said
    assert get(server_process, "/internal/logs/raw")["entries"][-1]["m"].startswith("WARNING: ")
    assert server_process.ask("/internal/logs/subscribe", {"clientId": ["x"]}, "PATCH").status == 400


def test_new_lines_of_the_log_go_to_those_who_read_it(server_process: ServerProcess):
    import asyncio

    import aiohttp

    def subscribe(enabled: bool) -> None:
        body = {"clientId": "reader", "enabled": enabled}
        assert server_process.ask("/internal/logs/subscribe", body, "PATCH").status == 200

    async def first_line() -> dict[str, Any]:
        url = f"{server_process.url}/ws?clientId=reader"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            await asyncio.to_thread(subscribe, True)
            await asyncio.to_thread(server_process.ask, "/x", headers={"Host": "evil.example"})
            while (message := await socket.receive_json(timeout=20))["type"] != "logs":
                pass
            await asyncio.to_thread(subscribe, False)
            return message["data"]

    said = asyncio.run(first_line())
    assert "evil.example" in said["entries"][0]["m"]
    assert said["size"]["cols"] > 0


def test_only_the_latest_readers_of_the_log_are_kept():
    lines = LogLines(lambda line, client_id: None)
    for number in range(100):
        lines.subscribe(str(number), True)
    assert lines.readers == tuple(str(n) for n in range(100 - MAX_READERS, 100))
    lines.subscribe("99", False)
    assert "99" not in lines.readers


def test_translations_are_merged_by_language(tmp_path: Path):
    for name, data in (("en/main", {"a": 1}), ("en/nodeDefs", {"N": {}}), ("zh/commands", {"c": 2}), ("fr/main", {})):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data))
    (tmp_path / "zh" / "settings.json").write_text("{")
    assert translations(tmp_path) == {"en": {"a": 1, "nodeDefs": {"N": {}}}, "zh": {"commands": {"c": 2}}}


# --- settings and user data -----------------------------------------------------------------------------------------


def test_settings_are_kept_one_by_one_and_together(server_process: ServerProcess):
    assert server_process.ask("/api/settings/Comfy.A", "text").status == 200
    assert server_process.ask("/api/settings", {"Comfy.B": [1], "Comfy.C": None}).status == 200
    found = get(server_process, "/api/settings")
    assert (found["Comfy.A"], found["Comfy.B"], found["Comfy.C"]) == ("text", [1], None)
    assert get(server_process, "/api/settings/Comfy.B") == [1]
    assert get(server_process, "/api/settings/Comfy.None") is None
    kept = json.loads((server_process.base / "user" / "default" / "comfy.settings.json").read_text())
    assert kept["Comfy.A"] == "text"


def test_news_of_comfyui_are_not_asked_for_unless_they_are_wanted(server_process: ServerProcess):
    name = "Comfy.Notification.ShowVersionUpdates"
    assert get(server_process, "/api/settings")[name] is False
    server_process.ask(f"/api/settings/{name}", True)
    assert get(server_process, f"/api/settings/{name}") is True
    server_process.ask(f"/api/settings/{name}", False)


def test_numbers_that_no_page_can_read_are_null(tmp_path: Path):
    path = tmp_path / "comfy.settings.json"
    path.write_text('{"a": NaN, "b": [-Infinity, 1e999, 0.5], "c": 1}')
    assert Settings(path).read() == {"a": None, "b": [None, None, 0.5], "c": 1}


@pytest.mark.parametrize("damage", ["{", "[]", "\ufeff", "[" * 100_000])
def test_damaged_settings_are_kept_aside(tmp_path: Path, damage: str):
    path = tmp_path / "comfy.settings.json"
    path.write_text(damage, encoding="utf-8")
    found = Settings(path)
    assert found.read() == {}
    found.update({"a": 1})
    assert found.read() == {"a": 1}
    assert (tmp_path / "comfy.settings.damaged.json").read_text(encoding="utf-8") == damage


def test_workflows_are_written_listed_moved_and_deleted(server_process: ServerProcess):
    folder = server_process.base / "user" / "default" / "workflows"
    saved = server_process.ask("/api/userdata/workflows%2Fa%20b%2F100%25.json?overwrite=false&full_info=true", b"{}")
    assert saved.json().items() >= {"path": "workflows/a b/100%.json", "size": 2}.items()
    assert stat.S_IMODE((folder / "a b" / "100%.json").stat().st_mode) & 0o400
    assert server_process.ask("/api/userdata/workflows%2Fa%20b%2F100%25.json?overwrite=false", b"x").status == 409
    assert server_process.ask("/api/userdata/workflows%2Fa%20b%2F100%25.json").body == b"{}"

    listed = get(server_process, "/api/userdata?dir=workflows&recurse=true&split=false&full_info=true")
    assert [(e["path"], e["size"]) for e in listed] == [("a b/100%.json", 2)]
    assert get(server_process, "/api/userdata?dir=workflows") == []
    assert get(server_process, "/api/userdata?dir=workflows&recurse=true&split=true") == [
        ["a b/100%.json", "a b", "100%.json"]
    ]
    tree = get(server_process, "/api/v2/userdata?path=workflows")
    assert [(e["type"], e["path"]) for e in tree] == [
        ("directory", "workflows/a b"),
        ("file", "workflows/a b/100%.json"),
    ]

    moved = server_process.ask("/api/userdata/workflows%2Fa%20b%2F100%25.json/move/workflows%2Fc.json", b"")
    assert moved.json() == "workflows/c.json"
    assert server_process.ask("/api/userdata/workflows%2Fc.json", method="DELETE").status == 204
    assert server_process.ask("/api/userdata/workflows%2Fc.json").status == 404
    assert not list(folder.rglob("*.tmp"))


def test_user_data_that_is_missing_or_no_file(server_process: ServerProcess):
    assert server_process.ask("/api/userdata").status == 400
    assert server_process.ask("/api/userdata?dir=none").status == 404
    assert server_process.ask("/api/userdata/workflows").status == 404
    assert server_process.ask("/api/userdata/workflows", b"x").status == 400
    assert server_process.ask("/api/userdata/none/move/x", b"").status == 404
    assert server_process.ask("/api/users", {"username": "x"}).status == 400


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture(mode: str = "RGBA", color: Any = (10, 200, 30, 128), **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 4), color).save(buffer, "PNG", **how)
    return buffer.getvalue()


def upload(server: ServerProcess, name: str, data: bytes, path: str = "/upload/image", **fields: str) -> Any:
    parts = [(f'name="image"; filename="{name}"', data), *((f'name="{n}"', v.encode()) for n, v in fields.items())]
    body = b"".join(
        f"--B\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + v + b"\r\n" for head, v in parts
    )
    answer = server.ask(path, body + b"--B--\r\n", headers=MULTIPART)
    assert answer.status == 200, answer.body
    return answer.json()


def opened(server: ServerProcess, query: str) -> tuple[str, Image.Image]:
    answer = server.ask(f"/api/view?{query}")
    assert answer.status == 200, answer.body
    return answer.headers["Content-Type"], Image.open(io.BytesIO(answer.body))


def test_uploads_get_a_free_name_unless_they_are_the_same(server_process: ServerProcess):
    data, other = picture(), picture("RGB", (0, 0, 0))
    first = {"name": "same.png", "subfolder": "", "type": "input"}
    assert upload(server_process, "same.png", data) == first
    assert upload(server_process, "same.png", data) == first
    assert upload(server_process, "same.png", other)["name"] == "same (1).png"
    assert upload(server_process, "same.png", other, overwrite="true") == first
    assert server_process.ask("/view?filename=same.png&type=input").body == other
    placed = upload(server_process, "same.png", data, subfolder="clipspace", type="temp")
    assert placed == {"name": "same.png", "subfolder": "clipspace", "type": "temp"}
    assert server_process.ask("/view?filename=same.png&type=temp&subfolder=clipspace").body == data
    assert server_process.ask("/view?filename=clipspace%2Fsame.png%20[temp]").body == data
    assert "same.png [input]" in get(server_process, "/internal/files/input")


def test_a_mask_becomes_the_transparency_of_its_picture(server_process: ServerProcess):
    text = PngInfo()
    text.add_text("workflow", '{"nodes": []}')
    upload(server_process, "original.png", picture("RGB", (10, 200, 30), pnginfo=text))
    ref = json.dumps({"filename": "original.png", "subfolder": "", "type": "input"})
    made = upload(server_process, "masked.png", picture(), "/api/upload/mask", original_ref=ref)
    _, found = opened(server_process, f"filename={made['name']}&type=input")
    assert found.getpixel((0, 0)) == (10, 200, 30, 128)
    assert found.text["workflow"] == '{"nodes": []}'


@pytest.mark.parametrize(
    ("query", "kind", "mode", "pixel"),
    [
        ("", "image/png", "RGBA", (10, 200, 30, 128)),
        ("&channel=rgba", "image/png", "RGBA", (10, 200, 30, 128)),
        ("&channel=rgb", "image/png", "RGB", (10, 200, 30)),
        ("&channel=a", "image/png", "RGBA", (0, 0, 0, 128)),
        ("&preview=webp;90", "image/webp", "RGBA", None),
        ("&preview=webp", "image/webp", "RGBA", None),
        ("&preview=jpeg;500", "image/jpeg", "RGB", None),
        ("&preview=exe;x", "image/webp", "RGBA", None),
        ("&preview=webp;50&channel=rgb", "image/webp", "RGB", None),
        ("&preview=jpeg&channel=a", "image/webp", "RGBA", None),
    ],
)
def test_view_shows_a_picture_as_it_was_asked(
    server_process: ServerProcess, query: str, kind: str, mode: str, pixel: tuple[int, ...] | None
):
    (server_process.base / "out" / "view.png").write_bytes(picture())
    got, found = opened(server_process, f"filename=view.png{query}")
    assert (got, found.mode, found.size) == (kind, mode, (8, 4))
    assert pixel is None or found.getpixel((0, 0)) == pixel


def test_view_gives_parts_of_a_file_and_names_in_any_alphabet(server_process: ServerProcess):
    (server_process.base / "out" / 'ü日 ".png').write_bytes(b"0123456789")
    answer = server_process.ask("/view?filename=%C3%BC%E6%97%A5%20%22.png", headers={"Range": "bytes=2-4"})
    assert (answer.status, answer.body) == (206, b"234")
    disposition = answer.headers["Content-Disposition"]
    assert disposition == "inline; filename=\"__ _.png\"; filename*=UTF-8''%C3%BC%E6%97%A5%20%22.png"
    assert server_process.ask("/view?filename=none.png").status == 404
    assert server_process.ask("/view").status == 400
    assert server_process.ask("/view?filename=x&type=models").status == 400


# --- models -----------------------------------------------------------------------------------------------------------


def test_model_lists(server_process: ServerProcess):
    assert {"checkpoints", "diffusion_models", "text_encoders", "vae"} <= set(get(server_process, "/models"))
    assert get(server_process, "/models/diffusion_models") == ["digits_flux.safetensors"]
    (entry,) = get(server_process, "/experiment/models/vae")
    assert entry.items() >= {"name": "digits_tae.safetensors", "pathIndex": 0}.items()
    assert entry["size"] > 1000
    assert server_process.ask("/models/none").status == 404
    assert server_process.ask("/experiment/models/none").status == 404
    assert server_process.ask("/view_metadata/vae?filename=none.safetensors").status == 404
    assert server_process.ask("/experiment/models/preview/vae/0/digits_tae.safetensors").status == 404


def test_the_header_and_the_picture_of_a_model(tmp_path: Path):
    import torch
    from aiohttp.test_utils import make_mocked_request
    from quantwire.hosts.standalone.server import model_files
    from safetensors.torch import save_file

    folder = tmp_path / "models" / "loras"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "x.safetensors", {"author": "somebody"})
    (folder / "x.preview.png").write_bytes(picture())
    server = Server(ServerConfig(tmp_path, models=(tmp_path / "models",)))
    query = make_mocked_request("GET", "/?filename=x.safetensors").query
    assert model_files._metadata(server, "loras", query) == {"author": "somebody"}
    shown = model_files._preview(server, "loras", {"index": "0", "name": "x.safetensors"})
    assert Image.open(io.BytesIO(shown)).format == "WEBP"
