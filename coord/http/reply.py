"""Request and reply: the answer is the row once the job's effect has landed, else that the job goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import Header, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from coord.database.engine import AnySession, session_of
from coord.database.target import M
from coord.database.transaction import cut_connections, end_transaction
from coord.durations import Seconds
from coord.errors import WaitTimeoutError
from coord.http.interruption import while_connected
from coord.http.jobs import Accepted, AcceptedJob
from coord.http.limits import ARRIVAL, MAX_WAIT_SECONDS, Arrival
from coord.http.prefer import Preference
from coord.http.problem import RETRY_AFTER_SECONDS
from coord.jobs.model import Job, JobState
from coord.jobs.queries import get_job
from coord.retryable import is_retryable
from coord.timings import wait_timings
from coord.waiting.job_wait import job_id_of
from coord.waiting.wait import wait_for_row_change

STATE_TIMEOUT_SECONDS = 0.5
"""For reading a job's state, when the client has waited long enough."""
PREFER = Header(alias="Prefer", description="RFC 7240: `wait=N`, in seconds, and `respond-async`.")
PREFERENCE_APPLIED = {
    "Preference-Applied": {"description": "The preferences that made a difference.", "schema": {"type": "string"}}
}


class Reply:
    """One request's wait and answer: how long it may take, counted from its arrival, and the answer."""

    def __init__(self, request: Request, response: Response) -> None:
        self._request = request
        self._response = response
        arrival = request.scope.get(ARRIVAL) or Arrival(asyncio.get_running_loop().time(), MAX_WAIT_SECONDS)
        self._cap = arrival.cap
        self._server_timing = arrival.server_timing
        self._waited = False
        self.preference = Preference.of(request.headers.getlist("prefer"))
        """The preferences that the client has sent."""
        self.deadline = arrival.time + self.preference.seconds(arrival.cap)
        """Until when to wait, on the event loop's clock."""

    async def row(
        self,
        session: AnySession,
        model: type[M],
        pk_value: Any,
        *,
        job: Job | UUID | None = None,
        columns: Sequence[Any] | None = None,
        interval: Seconds = 0.5,
        since: Mapping[str, Any] | M | None = None,
        until: Callable[[M], bool] | None = None,
    ) -> M | None:
        """The row, as from `wait_for_row_change`, or None if time is up or the server stops; the job goes on.

        A client that leaves ends the wait within a second, with starlette's `ClientDisconnect`; otherwise raises what
        `wait_for_row_change` does, but for `WaitTimeoutError`.
        """
        session = session_of(session)  # this task's, and not that of the task that waits
        self._waited = True
        self._say_what_applied(accepted=False)
        wait = wait_for_row_change(
            session,
            model,
            pk_value,
            columns=columns,
            interval=interval,
            timeout=max(0.0, self.deadline - asyncio.get_running_loop().time()),
            since=since,
            until=until,
            job=job,
        )
        try:
            return await while_connected(self._request, wait)
        except WaitTimeoutError:
            return None
        finally:
            if self._server_timing and (timings := wait_timings(session)) is not None:
                self._response.headers["Server-Timing"] = timings.server_timing()

    async def accepted(self, session: AnySession, job: Job | UUID, *, location: str, **members: Any) -> Response:
        """202: the job, where to look at it and when, and `members` beside it in the body; reads the ledger.

        When that takes longer than half a second, or PostgreSQL is away, a `Job` is given in the state that it had.
        """
        self._say_what_applied(accepted=True)
        headers = {"Location": location, "Retry-After": str(RETRY_AFTER_SECONDS)}
        accepted = AcceptedJob(id=job_id_of(job), state=await _state_of(session_of(session), job))
        return self.with_headers(JSONResponse({"job": accepted.model_dump(mode="json"), **members}, 202, headers))

    def with_headers(self, answer: Response) -> Response:
        """What the handler has set on its `Response`, which FastAPI adds only to what is not one itself."""
        answer.headers.raw.extend(self._response.headers.raw)
        return answer

    def _say_what_applied(self, *, accepted: bool) -> None:
        if applied := self.preference.applied(self._cap, waited=self._waited, accepted=accepted):
            self._response.headers["Preference-Applied"] = applied


async def _state_of(session: AsyncSession, job: Job | UUID) -> JobState:
    depends = session.in_transaction()
    cut = asyncio.get_running_loop().call_later(STATE_TIMEOUT_SECONDS, cut_connections, session)
    try:
        async with asyncio.timeout(STATE_TIMEOUT_SECONDS):  # for a connection as well
            return (await get_job(session, job_id_of(job))).state
    except Exception as error:
        if depends or isinstance(job, UUID) or not (isinstance(error, TimeoutError) or is_retryable(error)):
            raise
        await end_transaction(session)
        return job.state
    finally:
        cut.cancel()


async def reply(request: Request, response: Response, _prefer: Annotated[str | None, PREFER] = None) -> Reply:
    """A dependency: `Annotated[Reply, Depends(reply)]`."""
    return Reply(request, response)


def replies(
    accepted: type[Accepted] = Accepted, *, links: Mapping[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`: that it may wait, and what its 202 is; `links` say which operations that leads to.

    A model with more members than the job, those that `Reply.accepted` is given, is a subclass of `Accepted`; any other
    is a `ValueError`, since what a route answers otherwise is its `response_model`.
    """
    if not issubclass(accepted, Accepted):
        raise ValueError(f"{accepted.__name__} is no coord.http.Accepted; a route's own answer is its response_model")  # noqa: TRY004
    headers: dict[str, Any] = {
        "Location": {"description": "Where to look at the job.", "schema": {"type": "string"}, "required": True},
        "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}, "required": True},
    }
    going_on = {"description": "The job goes on", "model": accepted, "headers": headers | PREFERENCE_APPLIED}
    return {200: {"headers": PREFERENCE_APPLIED}, 202: going_on | ({"links": links} if links else {})}
