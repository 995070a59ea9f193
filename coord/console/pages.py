"""The pages: what each reads, and how often."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from coord.console.figures import count_jobs, last_hour
from coord.console.job import actions_of, as_text, find_job, largest, parts_of, timeline
from coord.console.listing import AGES, MAX_FEW, Filter, count_page, list_page
from coord.console.live import UnreadableError
from coord.console.locks import forest
from coord.errors import RowNotFoundError
from coord.fleet import look_at_fleet
from coord.http.problem import public_reason
from coord.jobs.model import JobState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession
    from starlette.requests import Request

    from coord.console.access import Viewer
    from coord.console.desk import Desk

    Read = Callable[[Desk, Request, Viewer], Awaitable[dict[str, Any]]]

INTERVAL_SECONDS = 2.0
COUNT_INTERVAL_SECONDS = 10.0
HEAVY_SHARE = 0.02
"""Of a core: for what reads much of a large ledger."""
MAX_SHOWN_WAITS = 200


@dataclass(frozen=True, slots=True)
class Page:
    path: str
    name: str
    """Of its templates, `name.html` and `name_live.html`."""
    title: str
    read: Read
    interval: float = INTERVAL_SECONDS


async def overview(desk: Desk, request: Request, viewer: Viewer) -> dict[str, Any]:
    fleet = await desk.reads.get("fleet", look_at_fleet, interval=INTERVAL_SECONDS)
    counts = await desk.reads.get("counts", count_jobs, interval=INTERVAL_SECONDS, share=HEAVY_SHARE)
    backends = await desk.locks()
    try:
        hour = await desk.reads.get("hour", last_hour, interval=COUNT_INTERVAL_SECONDS, share=HEAVY_SHARE)
    except UnreadableError:  # a ledger of many millions; the rest is told all the same
        hour = None
    return {
        "fleet": fleet,
        "counts": counts,
        "hour": hour,
        "blocked": sum(backend.waits_for is not None for backend in backends),
        "waits": len(desk.waits()),
        "percentiles": desk.timings.percentiles(),
        "answered": desk.timings.answered,
        "pid": os.getpid(),
    }


async def locks(desk: Desk, request: Request, viewer: Viewer) -> dict[str, Any]:
    backends = await desk.locks()
    waiting = [backend for backend in backends if backend.waits_for is not None]
    return {
        "roots": forest(backends),
        "waiting": len(waiting),
        "longest": max((backend.waiting_seconds or 0.0 for backend in waiting), default=0.0),
        "history": desk.history.recent(viewer),
    }


async def waits(desk: Desk, request: Request, viewer: Viewer) -> dict[str, Any]:
    found = desk.waits()
    models = Counter(wait.model for wait in found)
    return {"waits": found[:MAX_SHOWN_WAITS], "all": len(found), "models": models.most_common(), "pid": os.getpid()}


async def job_list(desk: Desk, request: Request, viewer: Viewer) -> dict[str, Any]:
    """`ValueError` for a filter that there is not."""
    wanted = Filter.of(request.query_params)
    given = request.query_params.get("before")
    before = UUID(given) if given else None
    count = partial(count_page, wanted=wanted)
    try:
        number = await desk.reads.get(("count", wanted), count, interval=COUNT_INTERVAL_SECONDS, share=HEAVY_SHARE)
    except UnreadableError:  # not in time
        number = None
    few = number is not None and number.value <= MAX_FEW
    read = partial(list_page, wanted=wanted, before=before, few=few)
    listing = await desk.reads.get(("jobs", wanted, before), read, interval=INTERVAL_SECONDS)
    return {
        "filter": wanted,
        "before": before,
        "listing": listing,
        "number": number,
        "ages": AGES,
        "states": [*JobState],
        "error_of": (lambda job: job.error) if viewer.is_full else (lambda job: public_reason(job.error)),
    }


async def one_job(desk: Desk, request: Request, viewer: Viewer) -> dict[str, Any]:
    """`RowNotFoundError` if the ledger does not have it."""
    job_id: UUID = request.path_params["job_id"]

    async def read(session: AsyncSession) -> Any:
        try:
            return await find_job(session, job_id)
        except RowNotFoundError:
            return None

    found = await desk.reads.get(("job", job_id), read, interval=INTERVAL_SECONDS)
    if found is None:
        raise RowNotFoundError(f"there is no job {job_id}, or not any more")
    told = desk.timings.of(job_id)
    spent = None if told is None else told.seen_by(viewer)
    parts = parts_of(found, spent)
    return {
        "job": found.report,
        "found": found,
        "moments": timeline(found, spent, full=viewer.is_full),
        "parts": parts,
        "largest": largest(parts),
        "told": spent is not None and found.report.state.is_final,
        "error": found.report.error if viewer.is_full else public_reason(found.report.error),
        "actions": actions_of(found.report),
        "as_text": as_text,
    }


PAGES = (
    Page("/", "overview", "Overview", overview),
    Page("/locks", "locks", "Locks", locks, interval=1.0),
    Page("/waits", "waits", "Waits", waits),
    Page("/jobs", "jobs", "Jobs", job_list),
    Page("/jobs/{job_id:uuid}", "job", "Job", one_job),
)
