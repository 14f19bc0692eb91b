"""POST /upload/image and /upload/mask: files into the input folder (or output, temp), under names made safe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http import HttpProcessingError

from . import pictures
from .answers import Refused
from .confine import ILLEGAL, inside, shown, temporary_beside
from .files import find
from .security import BODY_TIMEOUT_S

if TYPE_CHECKING:
    from .app import Server

CHUNK_NBYTES = 1 << 16
MAX_FIELD_NBYTES = 1 << 16
MAX_FIELDS = 16
MAX_STEM, MAX_SUFFIX = 150, 16
UPLOAD_S = 600
# Windows opens the device, whatever the suffix.
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
IN_MEMORY_NBYTES = 8 << 20
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')


@dataclass
class Form:
    """A form as it arrived; the file is kept apart from memory once it is large."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    file: IO[bytes] | None = None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def routes(server: Server) -> list[web.RouteDef]:
    def upload(save: Callable[[Form, Path], None], run: Callable[..., Any]) -> Callable[[web.Request], Any]:
        async def handler(request: web.Request) -> web.Response:
            form = await _read(request, server.config.max_upload_nbytes)
            if form.file is None:
                raise Refused(400, "The form has no file named image.")
            with contextlib.closing(form):
                return web.json_response(await run(lambda: _store(server, form, save)))

        return handler

    def save_mask(form: Form, target: Path) -> None:
        assert form.file is not None
        original = _original(server, form)
        target.write_bytes(pictures.masked(original, form.file))

    return [
        web.post("/upload/image", upload(_save_as_it_is, server.in_thread)),
        web.post("/upload/mask", upload(save_mask, server.with_pictures)),
    ]


def safe_name(name: str) -> str:
    """The last part of a name, without what some file system or shell reads as more than a letter.

    Raises:
        Refused: 400, nothing is left of it.
    """
    base = re.split(r"[/\\]", name)[-1].encode("utf-8", "replace").decode()
    stem, suffix = os.path.splitext(UNSAFE.sub("_", base).strip(" ."))
    while len(stem.encode()) > MAX_STEM:
        stem = stem[:-1]
    made = (stem + suffix[:MAX_SUFFIX]).strip(" .")
    if not made:
        raise Refused(400, f"'{shown(name)}' is no name for a file.")
    return f"_{made}" if made.startswith("-") or stem.upper() in DEVICES else made


async def _read(request: web.Request, limit_nbytes: int) -> Form:
    """The form, at most `limit_nbytes` of it.

    Raises:
        Refused: 413 for a longer one, 408 where nothing arrives for a while, 400 for what is no form.
    """
    if not request.content_type.startswith("multipart/"):
        raise Refused(400, "An upload is a multipart form.")
    if (request.content_length or 0) > limit_nbytes:
        raise Refused(413, f"The upload has {request.content_length} bytes; at most {limit_nbytes} are taken.")
    form = Form()
    try:
        await asyncio.wait_for(_read_parts(await request.multipart(), form, limit_nbytes), UPLOAD_S)
    except asyncio.TimeoutError as err:
        form.close()
        raise Refused(
            408, f"Nothing of the upload arrived for {BODY_TIMEOUT_S} s, or not all in {UPLOAD_S} s."
        ) from err
    except (
        ValueError,
        AssertionError,
        web.RequestPayloadError,
        HttpProcessingError,
    ) as err:  # aiohttp's for a bad form
        form.close()
        raise Refused(400, "The upload is no whole multipart form.") from err
    except BaseException:
        form.close()
        raise
    return form


async def _read_parts(reader: MultipartReader, form: Form, left_nbytes: int) -> None:
    for _ in range(MAX_FIELDS):
        part = await asyncio.wait_for(reader.next(), BODY_TIMEOUT_S)
        if part is None:
            return
        if not isinstance(part, BodyPartReader):
            raise Refused(400, "The form holds another form.")
        if part.name == "image":
            if form.file is not None:
                raise Refused(400, "The form has two files named image.")
            form.filename = part.filename or ""
            form.file = tempfile.SpooledTemporaryFile(IN_MEMORY_NBYTES)  # noqa: SIM115 (the route closes it)
            left_nbytes -= await _copy(part, form.file.write, left_nbytes)
            form.file.seek(0)
        else:
            text = bytearray()
            left_nbytes -= await _copy(part, text.extend, min(left_nbytes, MAX_FIELD_NBYTES))
            form.fields[part.name or ""] = text.decode("utf-8", "replace")
    raise Refused(400, f"The form has more than {MAX_FIELDS} fields.")


async def _copy(part: BodyPartReader, write: Callable[[bytes], Any], limit_nbytes: int) -> int:
    count = 0
    while chunk := await asyncio.wait_for(part.read_chunk(CHUNK_NBYTES), BODY_TIMEOUT_S):
        count += len(chunk)
        if count > limit_nbytes:
            raise Refused(413, f"The upload is longer than the {limit_nbytes} bytes that are taken.")
        write(chunk)
    return count


def _store(server: Server, form: Form, save: Callable[[Form, Path], None]) -> dict[str, str]:
    """Write the file under a name that is free, or under its own where it is to be replaced or already there."""
    assert form.file is not None
    kind = form.fields.get("type") or "input"
    root = server.config.folder(kind)
    if root is None:
        raise Refused(400, f"type '{kind[:50]}' is none of output, input, temp.")
    name, subfolder = safe_name(form.filename), form.fields.get("subfolder", "").strip("/")
    if form.fields.get("subfolder", "").startswith("/") and subfolder:
        raise Refused(403, "The subfolder leads out of its folder.")
    folder = inside(root, subfolder, empty=True)
    inside(root, f"{subfolder}/{name}" if subfolder else name)
    temporary = temporary_beside(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(form, temporary)
        if form.fields.get("overwrite") not in ("true", "1"):
            name = _free_name(folder, name, temporary)
        os.replace(temporary, folder / name)
    except OSError as err:
        raise Refused(400, f"'{shown(name)}' cannot be written: {err.strerror or err}.") from err
    finally:
        with contextlib.suppress(OSError):  # it is gone where it was renamed, and may never have been there
            temporary.unlink()
    return {"name": name, "subfolder": subfolder, "type": kind}


def _free_name(folder: Path, name: str, written: Path) -> str:
    """`x.png`, or `x (1).png` and on where another file has that name; the same file keeps its name."""
    stem, suffix = os.path.splitext(name)
    number, tried = 0, name
    while os.path.lexists(folder / tried):
        if not (folder / tried).is_symlink() and _same(folder / tried, written):
            return tried
        number += 1
        tried = f"{stem} ({number}){suffix}"
    return tried


def _same(one: Path, other: Path) -> bool:
    import filecmp

    return one.is_file() and filecmp.cmp(one, other, shallow=False)


def _save_as_it_is(form: Form, target: Path) -> None:
    assert form.file is not None
    with target.open("xb") as out:
        shutil.copyfileobj(form.file, out)


def _original(server: Server, form: Form) -> Path:
    """The picture that a mask belongs to, from the field `original_ref`."""
    try:
        ref = json.loads(form.fields.get("original_ref", ""))
        words = [ref.get(key) or default for key, default in (("filename", ""), ("type", "output"), ("subfolder", ""))]
    except (ValueError, AttributeError, RecursionError) as err:
        raise Refused(400, "The form's original_ref is no JSON object.") from err
    if not all(isinstance(word, str) for word in words) or ILLEGAL.search("".join(words)):
        raise Refused(400, "The form's original_ref names no file.")
    return find(server, *words)
