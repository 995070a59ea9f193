"""Event streams of a row: its state now, then the newest after each change, for a minute at most."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from inspect import iscoroutinefunction
from typing import Annotated, Any
from uuid import UUID
from weakref import WeakValueDictionary

from fastapi import Depends, Header, HTTPException
from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import object_session

from coord.cancellation import interruptible, uninterrupted
from coord.database.engine import bind_for_writes, engines_of, prepare
from coord.database.schemas import read_as
from coord.durations import Seconds, seconds
from coord.errors import RowNotFoundError, TooManyWaitersError, message_of
from coord.http.interruption import ended, stop_observed
from coord.http.jobs import JobStatus
from coord.jobs.model import Job, JobState
from coord.jobs.queries import heartbeats
from coord.waiting.wait import watch_row

Dependency = Callable[..., AsyncGenerator[AsyncIterator[Any], None]]

logger = logging.getLogger("coord.http")

MAX_STREAMS = 1_000
MAX_DURATION_SECONDS = 60.0
HEARTBEAT_INTERVAL_SECONDS = 2.0
"""Between two heartbeats of a worker, and between two reads of them for a stream."""
MAX_AGE_SECONDS = 1.0
"""For which one read of them will do for all streams."""
READ_SECONDS = 1.0
"""That it may take: no stream outlives its time, or its server, for want of it."""
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
    connection. Each has a session of its own, since FastAPI lets it begin while the request's still commits; it has the
    `info` of the session that has read the row, and reads under the same `schema_translate_map`.
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
        a browser does not come back. Both are plain functions; for another it is a `TypeError`.
        """
        if iscoroutinefunction(id) or iscoroutinefunction(is_final):
            raise TypeError("id and is_final are plain functions; of an asynchronous one every state would be final")
        return self._following(row, columns, id, is_final, running=None)

    def jobs(self, job: Callable[..., Any]) -> Dependency:
        """A dependency: each `JobStatus` of the job that the dependency `job` gives, until it has ended."""
        columns = [Job.state, Job.attempt, Job.error]
        return self._following(job, columns, _event_id, lambda job: job.state.is_final, running=self._running)

    def _following(
        self,
        row: Callable[..., Any],
        columns: Sequence[Any] | None,
        id: Callable[[Any], str],
        is_final: Callable[[Any], bool],
        running: RunningJobs | None,
    ) -> Dependency:
        async def states(
            now: Any = Depends(row), last: Annotated[str | None, LAST_EVENT_ID] = None
        ) -> AsyncGenerator[AsyncIterator[Any], None]:
            if last is not None and is_final(now) and id(now) == last:
                raise HTTPException(204)
            async with (
                self._watched(now, columns) as (own, changes),
                aclosing(_states(own, changes, last, id, is_final, self._duration, running)) as news,
            ):
                yield news

        return states

    @asynccontextmanager
    async def _watched(self, now: Any, columns: Sequence[Any] | None) -> AsyncIterator[tuple[Any, AsyncIterator[Any]]]:
        if self._open >= self._max:
            raise TooManyWaitersError(f"{self._open} event streams are as many as this process serves")
        self._open += 1
        try:
            mapper, reader = inspect(type(now)), object_session(now)
            key = tuple(mapper.primary_key_from_instance(now))
            async with self._session_maker() as session:
                if reader is not None:
                    read_as(session.sync_session, reader, **bind_for_writes(mapper))
                async with watch_row(session, type(now), key, columns=columns, since=now) as changes:
                    # A commit of the request's session may expire the other.
                    yield await session.merge(now, load=False), changes
        finally:
            self._open -= 1


class RunningJobs:
    """The workers' last heartbeats."""

    def __init__(self, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self._session_maker = session_maker
        self._running: set[tuple[UUID, int]] = set()
        self._expires = 0.0
        self._mutexes: WeakValueDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakValueDictionary()
        """One for each event loop that serves streams, as long as one of these reads."""

    async def status_of(self, job: Job) -> JobStatus:
        """As it is at the call: the instance may be brought up to date meanwhile.

        Reads the heartbeats only for an unfinished job, in a transaction of its own.
        """
        status = JobStatus.model_validate(job)
        if not status.state.is_final:
            mutex = self._mutexes.setdefault(asyncio.get_running_loop(), asyncio.Lock())
            async with mutex:
                await self._read()
            if (status.id, status.attempt) in self._running:
                status.state = JobState.RUNNING
        return status

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._expires:
            return
        try:
            self._running = await interruptible(self._found(), limit=READ_SECONDS)
        except Exception as error:  # noqa: BLE001 - what was known stays known until it can be read again
            logger.debug("The workers' heartbeats cannot be read: %s", message_of(error))
        self._expires = loop.time() + MAX_AGE_SECONDS  # now, or each stream would wait as long for a silent server

    async def _found(self) -> set[tuple[UUID, int]]:
        async with self._session_maker() as session:
            return {(beat.id, beat.attempt) for beat in await heartbeats(session)}


def finishes() -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`: that the stream may have ended, so that there is nothing to come back for."""
    return {204: {"description": "There is nothing after the client's last event"}}


def _event_id(job: Any) -> str:
    return JobStatus.model_validate(job).event_id


async def _states(
    row: Any,
    changes: AsyncIterator[Any],
    last: str | None,
    id: Callable[[Any], str],
    is_final: Callable[[Any], bool],
    duration: float,
    running: RunningJobs | None,
) -> AsyncGenerator[Any, None]:
    """The row now and after each change; of a job its status, also after each heartbeat, which says that it runs."""
    loop = asyncio.get_running_loop()
    end = loop.time() + duration
    interval = duration if running is None else HEARTBEAT_INTERVAL_SECONDS
    change: asyncio.Future[Any] | None = None
    with stop_observed() as stopped:
        try:
            while not stopped.done() and loop.time() < end:
                state = row if running is None else await running.status_of(row)
                final = is_final(state)
                if id(state) != last:
                    last = id(state)
                    yield state
                if final:
                    return
                change = change or asyncio.ensure_future(anext(changes))
                timeout = max(0, min(interval, end - loop.time()))
                await asyncio.wait({change, stopped}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if change.done():
                    row, change = change.result(), None
        except RowNotFoundError:
            return
        finally:
            if change is not None:
                await uninterrupted(ended(change))
