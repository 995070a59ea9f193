"""Request and reply: the answer is the row once the job's effect has landed, else that the job goes on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response  # noqa: TC002 - FastAPI reads the annotations
from fastapi.responses import JSONResponse

from coord.errors import WaitTimeoutError
from coord.http.disconnect import while_connected
from coord.http.limits import ARRIVED, WAIT
from coord.http.prefer import Preference
from coord.jobs.awaiting import job_id_of
from coord.jobs.operations import get_job
from coord.waiting import wait_for_row_change

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.durations import Seconds
    from coord.jobs.ledger import Job
    from coord.target import M

RETRY_AFTER = 1
"""Seconds after which to look at a job again."""


class Reply:
    """One request's wait and answer: how long it may take, counted from its arrival, and what to say then."""

    def __init__(self, request: Request, response: Response, *, cap: float = WAIT) -> None:
        self._request = request
        self._response = response
        self._cap = cap
        self.preference = Preference.of(request.headers.getlist("prefer"))
        """What the client has asked for."""
        arrived = request.scope.get(ARRIVED, asyncio.get_running_loop().time())
        self.deadline = arrived + self.preference.seconds(cap)
        """Until when to wait, on the event loop's clock."""

    async def row(
        self,
        session: AsyncSession,
        model: type[M],
        pk_value: Any,
        *,
        job: Job | UUID | None = None,
        columns: Sequence[Any] | None = None,
        interval: Seconds = 0.5,
        since: Mapping[str, Any] | M | None = None,
        until: Callable[[M], bool] | None = None,
    ) -> M | None:
        """The row, as from `wait_for_row_change`, or None when the time is up; the job goes on in any case.

        A client that leaves ends the wait within a second, with starlette's `ClientDisconnect`; otherwise raises what
        `wait_for_row_change` does, but for `WaitTimeoutError`.
        """
        left = max(0.0, self.deadline - asyncio.get_running_loop().time())
        wait = wait_for_row_change(
            session,
            model,
            pk_value,
            columns=columns,
            interval=interval,
            timeout=left,
            since=since,
            until=until,
            job=job,
        )
        try:
            row = await while_connected(self._request, wait)
        except WaitTimeoutError:
            return None
        if applied := self.preference.applied(self._cap, accepted=False):
            self._response.headers["Preference-Applied"] = applied
        return row

    async def accepted(self, session: AsyncSession, job: Job | UUID, *, location: str, **members: Any) -> JSONResponse:
        """202: the job, where to look at it and when, and `members` beside it in the body; reads the ledger."""
        report = await get_job(session, job_id_of(job))
        headers = {"Location": location, "Retry-After": str(RETRY_AFTER)}
        if applied := self.preference.applied(self._cap, accepted=True):
            headers["Preference-Applied"] = applied
        return JSONResponse({"job": {"id": str(report.id), "state": report.state}, **members}, 202, headers)


async def reply(request: Request, response: Response) -> Reply:
    """A dependency: `Annotated[Reply, Depends(reply)]`."""
    return Reply(request, response)
