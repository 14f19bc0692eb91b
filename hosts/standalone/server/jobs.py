"""/api/jobs: waiting, running and ended prompts in one list, as the editor's queue panel and gallery read them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import Refused, json_object

if TYPE_CHECKING:
    from .app import Server
    from .queue import Job

STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
MEDIA = {"images", "video", "audio", "3d", "text"}
TEXT_FILES = (".txt", ".md", ".json")
MAX_PREVIEW_TEXT = 1024


def job_id_fault(value: Any) -> str | None:
    """What is wrong with an id that a client chose: anything but a UUID as `str(uuid.UUID(...))` writes it."""
    try:
        if isinstance(value, str) and str(uuid.UUID(value)) == value:
            return None
    except ValueError:
        pass
    return f"{str(value)[:80]!r} is not a UUID in lower case with hyphens"


def summary_of(prompt_id: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An ended run without its outputs and workflow.

    Args:
        entry: of the history, as parsed JSON.
    """
    number, _, _, extra_data, _ = entry["prompt"]
    status = entry.get("status") or {}
    times: dict[str, Any] = {}
    error = None
    state = "completed" if status.get("status_str") == "success" else "failed"
    for name, data in status.get("messages", []):
        if name == "execution_start":
            times["execution_start_time"] = data.get("timestamp")
        elif name in ("execution_success", "execution_error", "execution_interrupted"):
            times["execution_end_time"] = data.get("timestamp")
            error = data if name == "execution_error" else None
            state = "cancelled" if name == "execution_interrupted" else state
    outputs = entry.get("outputs", {})
    job = {"id": prompt_id, "status": state, "priority": number, **_of_extra(extra_data), **times}
    if error is not None:
        job["execution_error"] = error
    return {**job, **_of_outputs(outputs)}


def _of_queue(job: Job, status: str) -> dict[str, Any]:
    counts = {"outputs_count": 0, "previewable_outputs_count": 0}
    return {"id": job.prompt_id, "status": status, "priority": job.number, **_of_extra(job.extra_data), **counts}


def _of_extra(extra_data: Mapping[str, Any]) -> dict[str, Any]:
    info = extra_data.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    found = {
        "create_time": extra_data.get("create_time"),
        "workflow_id": workflow.get("id") if isinstance(workflow, dict) else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _items(outputs: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(node id, kind, item) of all that nodes showed."""
    for node_id, shown in outputs.items():
        for kind, items in shown.items() if isinstance(shown, dict) else ():
            if kind != "animated" and isinstance(items, list):
                yield from ((node_id, kind, item) for item in items)


def _of_outputs(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """How many files there are, and the best one to show for the run: saved, else temporary, else text."""
    count = previewable = 0
    best: tuple[int, dict[str, Any]] | None = None
    for node_id, kind, item in _items(outputs):
        where = {"nodeId": node_id, "mediaType": kind}
        if isinstance(item, dict):
            if "filename" not in item:  # numbers that a node gives to its web extension
                continue
            count += 1
            if kind not in MEDIA and not _is_media_file(item):
                continue
            previewable += 1
            textual = kind == "text" or str(item.get("filename", "")).lower().endswith(TEXT_FILES)
            found = (2 if textual else 0 if item.get("type") == "output" else 1), {**where, **item, "nodeId": node_id}
        elif kind == "text" and isinstance(item, str):
            cut = {"truncated": True} if len(item) > MAX_PREVIEW_TEXT else {}
            found = 3, {"content": item[:MAX_PREVIEW_TEXT], **cut, **where}
        else:
            continue
        if best is None or found[0] < best[0]:
            best = found
    counts: dict[str, Any] = {"outputs_count": count, "previewable_outputs_count": previewable}
    return counts | ({"preview_output": best[1]} if best else {})


def _is_media_file(item: Mapping[str, Any]) -> bool:
    form = str(item.get("format", ""))
    return form.startswith(("video/", "audio/")) or str(item.get("filename", "")).lower().endswith(TEXT_FILES)


# --- routes ------------------------------------------------------------------------------------------------------


def routes(server: Server) -> list[web.RouteDef]:
    async def get_jobs(request: web.Request) -> web.Response:
        asked = request.query
        statuses = [s.strip().lower() for s in asked.get("status", "").split(",") if s.strip()] or list(STATUSES)
        if unknown := [s for s in statuses if s not in STATUSES]:
            raise Refused(400, f"status {unknown[0][:40]!r} is none of: {', '.join(STATUSES)}.")
        sort_by = _one_of(request, "sort_by", ("created_at", "execution_duration"))
        descending = _one_of(request, "sort_order", ("desc", "asc")) == "desc"
        limit, offset = _count(request, "limit", 1), _count(request, "offset", 0) or 0
        running, waiting = server.run.queue.snapshot()
        jobs = [_of_queue(j, "in_progress") for j in running] + [_of_queue(j, "pending") for j in waiting]
        jobs = [j for j in [*jobs, *server.run.history.summaries()] if j["status"] in statuses]
        if workflow := asked.get("workflow_id"):
            jobs = [j for j in jobs if j.get("workflow_id") == workflow]
        jobs.sort(key=_created if sort_by == "created_at" else _duration, reverse=descending)
        shown = jobs[offset:] if limit is None else jobs[offset : offset + limit]
        more = offset + len(shown) < len(jobs)
        pages = {"offset": offset, "limit": limit, "total": len(jobs), "has_more": more}
        return web.json_response({"jobs": shown, "pagination": pages})

    async def get_job(request: web.Request) -> web.Response:
        prompt_id = request.match_info["job_id"]
        entry = await server.in_thread(lambda: server.run.history.get(prompt_id))
        if entry is not None:
            return web.json_response(_in_full(prompt_id, entry))
        running, waiting = server.run.queue.snapshot()
        states = [(j, "in_progress") for j in running] + [(j, "pending") for j in waiting]
        for job, status in states:
            if job.prompt_id == prompt_id:
                workflow = {"prompt": job.prompt, "extra_data": job.extra_data}
                return web.json_response({**_of_queue(job, status), "workflow": workflow})
        raise Refused(404, "There is no such job.")

    async def cancel_one(request: web.Request) -> web.Response:
        return web.json_response({"cancelled": await cancel([request.match_info["job_id"]])})

    async def cancel_many(request: web.Request) -> web.Response:
        ids = (await json_object(request)).get("job_ids")
        if not isinstance(ids, list):
            raise Refused(400, "job_ids must be a list.")
        if wrong := [str(i)[:80] for i in ids if job_id_fault(i)]:
            return web.json_response({"error": "job_ids holds what is no job id", "invalid_ids": wrong}, status=400)
        return web.json_response({"cancelled": await cancel(ids)})

    async def cancel(ids: list[str]) -> bool:
        def work() -> bool:
            # Waiting ones first: a prompt that starts between the two steps is then found running.
            gone = server.run.queue.delete(ids)
            return any([bool(gone), *(server.run.queue.interrupt(i) for i in ids)])

        return await server.in_thread(work)

    return [
        web.get("/api/jobs", get_jobs),
        web.get("/api/jobs/{job_id}", get_job),
        web.post("/api/jobs/cancel", cancel_many),
        web.post("/api/jobs/{job_id}/cancel", cancel_one),
    ]


def _in_full(prompt_id: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    _, _, prompt, extra_data, _ = entry["prompt"]
    full = {"outputs": entry.get("outputs", {}), "execution_status": entry.get("status")}
    return {**summary_of(prompt_id, entry), **full, "workflow": {"prompt": prompt, "extra_data": extra_data}}


def _created(job: Mapping[str, Any]) -> float:
    return job.get("create_time") or 0


def _duration(job: Mapping[str, Any]) -> float:
    start, end = job.get("execution_start_time"), job.get("execution_end_time")
    return end - start if start and end else 0


def _one_of(request: web.Request, name: str, choices: tuple[str, ...]) -> str:
    value = request.query.get(name, choices[0]).lower()
    if value not in choices:
        raise Refused(400, f"{name} must be one of: {', '.join(choices)}.")
    return value


def _count(request: web.Request, name: str, low: int) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError as err:
        raise Refused(400, f"{name} must be a whole number, got {text[:40]!r}.") from err
    if value < low and low > 0:
        raise Refused(400, f"{name} must be at least {low}, got {value}.")
    return max(value, low)
