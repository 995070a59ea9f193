"""Event streams of a row: its state now, then the newest after each change, for a minute at most."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header, HTTPException
from sqlalchemy import inspect

from coord.cancellation import uninterrupted
from coord.database.engine import engines_of, prepare
from coord.durations import seconds
from coord.errors import RowNotFoundError, TooManyWaitersError
from coord.http.disconnect import ended
from coord.http.jobs import HEARTBEAT_INTERVAL_SECONDS, JobStatus, RunningJobs
from coord.http.stopping import stop_observed
from coord.jobs.model import Job
from coord.waiting.wait import watch_row

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.durations import Seconds

    Dependency = Callable[..., AsyncGenerator[AsyncIterator[Any], None]]

MAX_STREAMS = 1_000
MAX_DURATION_SECONDS = 60.0
LAST_EVENT_ID = Header(alias="Last-Event-ID", description="The id of the last event that the client has.")


class EventStreams:
    """The event streams of one process, and a cap on them.

        streams = EventStreams(session_maker)
        States = Annotated[AsyncIterator[Order], Depends(streams.of(known_order, id=version))]

        @app.get("/orders/{order_id}/events", response_class=EventSourceResponse)
        async def order_events(states: States) -> AsyncIterable[ServerSentEvent]:
            async for order in states:
                yield ServerSentEvent(data=OrderAnswer.model_validate(order), id=version(order))

    What cannot begin is refused before the answer begins: one stream too many is a `TooManyWaitersError`. A stream ends
    when its row is deleted, when the process is stopped, and `duration` seconds after it began: a browser then
    asks again with `Last-Event-ID`, and a server that stops without a signal need not wait longer. No stream holds a
    connection. Each has a session of its own, since FastAPI lets it begin while the request's still commits.
    """

    def __init__(
        self,
        session_maker: async_sessionmaker[AsyncSession],
        *,
        max_streams: int = MAX_STREAMS,
        duration: Seconds = MAX_DURATION_SECONDS,
    ) -> None:
        for engine in engines_of(session_maker()):  # none, if it is bound later, in a lifespan
            prepare(engine)
        self._session_maker = session_maker
        self._running = RunningJobs(session_maker)
        self._max = max_streams
        self._duration = seconds("duration", duration)
        self._open = 0

    def of(
        self,
        row: Callable[..., Any],
        *,
        id: Callable[[Any], str],
        columns: Sequence[Any] | None = None,
        is_final: Callable[[Any], bool] = lambda _: False,
    ) -> Dependency:
        """A dependency: the states of the row that the dependency `row` gives, as it is, then after each change.

        `id` tells states apart: one with the id of the one before, or of the client's `Last-Event-ID`, is left out. The
        stream ends after a state that `is_final`; to a client that has that one already the answer is 204, after which
        a browser does not come back.
        """

        async def states(
            now: Any = Depends(row), last: Annotated[str | None, LAST_EVENT_ID] = None
        ) -> AsyncGenerator[AsyncIterator[Any], None]:
            _refuse_finished(now, last, id, is_final)
            async with self._watched(now, columns) as rows:
                yield _new_states(rows, last, id, is_final)

        return states

    def jobs(self, job: Callable[..., Any]) -> Dependency:
        """A dependency: each `JobStatus` of the job that the dependency `job` gives, until it has ended."""

        async def statuses(
            now: Any = Depends(job), last: Annotated[str | None, LAST_EVENT_ID] = None
        ) -> AsyncGenerator[AsyncIterator[JobStatus], None]:
            _refuse_finished(JobStatus.model_validate(now), last, _event_id, _has_ended)
            watched = [Job.state, Job.attempt, Job.error]
            async with self._watched(now, watched, tick=HEARTBEAT_INTERVAL_SECONDS) as rows:
                yield _new_states(self._statuses(rows), last, _event_id, _has_ended)

        return statuses

    @asynccontextmanager
    async def _watched(
        self, now: Any, columns: Sequence[Any] | None, tick: float | None = None
    ) -> AsyncIterator[AsyncIterator[Any]]:
        if self._open >= self._max:
            raise TooManyWaitersError(f"{self._open} event streams are as many as this process serves")
        self._open += 1
        try:
            key = tuple(inspect(type(now)).primary_key_from_instance(now))
            async with (
                self._session_maker() as session,
                watch_row(session, type(now), key, columns=columns, since=now) as changes,
            ):
                own = await session.merge(now, load=False)  # a commit of the request's session may expire the other
                async with aclosing(_rows(own, changes, self._duration, tick)) as rows:
                    yield rows
        finally:
            self._open -= 1

    async def _statuses(self, jobs: AsyncIterator[Job]) -> AsyncIterator[JobStatus]:
        async for job in jobs:
            yield await self._running.status_of(job)


def finishes() -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`: that the stream may have ended, so that there is nothing to come back for."""
    return {204: {"description": "There is nothing after the client's last event"}}


def _refuse_finished(state: Any, last: str | None, id: Callable[[Any], str], is_final: Callable[[Any], bool]) -> None:
    if last is not None and is_final(state) and id(state) == last:
        raise HTTPException(204)


async def _new_states(
    states: AsyncIterator[Any], last: str | None, id: Callable[[Any], str], is_final: Callable[[Any], bool]
) -> AsyncIterator[Any]:
    async for state in states:
        final = is_final(state)
        if id(state) != last:
            last = id(state)
            yield state
        if final:
            return


async def _rows(
    row: Any, changes: AsyncIterator[Any], duration: float, tick: float | None
) -> AsyncGenerator[Any, None]:
    """The row now and after each change, and with `tick` again after so many seconds without one."""
    loop = asyncio.get_running_loop()
    end = loop.time() + duration
    change: asyncio.Future[Any] | None = None
    with stop_observed() as stopped:
        try:
            while True:
                yield row
                change = change or asyncio.ensure_future(anext(changes))
                left = max(0, end - loop.time())
                timeout = left if tick is None else min(tick, left)
                await asyncio.wait({change, stopped}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if stopped.done() or loop.time() >= end:
                    return
                if change.done():
                    row, change = change.result(), None
        except RowNotFoundError:
            return
        finally:
            if change is not None:
                await uninterrupted(ended(change))


def _event_id(status: JobStatus) -> str:
    return status.event_id


def _has_ended(status: JobStatus) -> bool:
    return status.state.is_final
