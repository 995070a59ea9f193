"""Streams of a row's states: the one now, then the newest after each change, until somebody has had enough."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header
from sqlalchemy import inspect

from coord.cancellation import uninterrupted
from coord.database.engine import engine_of, prepare
from coord.errors import RowNotFoundError, TooManyWaitersError
from coord.http.disconnect import ended
from coord.http.stages import BEAT, JobStage, Stages
from coord.http.stopping import signalled
from coord.jobs.model import Job
from coord.waiting.wait import watch_row

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    Dependency = Callable[..., AsyncGenerator[AsyncIterator[Any], None]]

MAX_STREAMS = 1_000
LAST_EVENT_ID = Header(alias="Last-Event-ID", description="The id of the last event that the client has.")


class EventStreams:
    """The event streams of one process: a cap on them, and their end when the server is told to stop.

    streams = EventStreams(session_maker)
    app = FastAPI(lifespan=streams.lifespan)
    States = Annotated[AsyncIterator[Order], Depends(streams.of(known_order, id=version))]

    @app.get("/orders/{order_id}/events", response_class=EventSourceResponse)
    async def order_events(states: States) -> AsyncIterable[ServerSentEvent]:
        async for order in states:
            yield ServerSentEvent(data=OrderAnswer.model_validate(order), id=version(order))

    What cannot begin is refused before the answer begins: one stream too many is a `TooManyWaitersError`. No stream
    holds a connection. Each has a session of its own, since FastAPI lets it begin while the request's still commits.
    """

    def __init__(self, session_maker: async_sessionmaker[AsyncSession], *, max_streams: int = MAX_STREAMS) -> None:
        prepare(engine_of(session_maker))
        self._session_maker = session_maker
        self._stages = Stages(session_maker)
        self._max = max_streams
        self._open = 0
        self._closing: asyncio.Event | None = None

    def of(
        self, row: Callable[..., Any], *, id: Callable[[Any], str], columns: Sequence[Any] | None = None
    ) -> Dependency:
        """A dependency: the states of the row that the dependency `row` gives, as it is, then after each change.

        `id` tells them apart: one with the id of the one before, or of the client's `Last-Event-ID`, is no news. Ends
        when the row is deleted and when the server stops.
        """

        async def states(
            now: Any = Depends(row), last: Annotated[str | None, LAST_EVENT_ID] = None
        ) -> AsyncGenerator[AsyncIterator[Any], None]:
            async with self._watched(now, columns) as rows:
                yield _news(rows, last, id)

        return states

    def jobs(self, job: Callable[..., Any]) -> Dependency:
        """A dependency: the `JobStage`s of the job that the dependency `job` gives, until it has ended."""

        async def stages(
            now: Any = Depends(job), last: Annotated[str | None, LAST_EVENT_ID] = None
        ) -> AsyncGenerator[AsyncIterator[JobStage], None]:
            async with self._watched(now, [Job.state, Job.attempt, Job.error], tick=BEAT) as rows:
                yield _news(self._stages_of(rows), last, lambda stage: stage.event_id)

        return stages

    @asynccontextmanager
    async def lifespan(self, _app: Any) -> AsyncIterator[None]:
        """End the streams when the server is signalled to stop: it would wait for them before it ends this block."""
        self._closing = closing = asyncio.Event()
        loop = asyncio.get_running_loop()
        with signalled(lambda: loop.call_soon_threadsafe(closing.set)):
            try:
                yield
            finally:
                closing.set()

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
                async with aclosing(_rows(own, changes, self._closing or asyncio.Event(), tick)) as rows:
                    yield rows
        finally:
            self._open -= 1

    async def _stages_of(self, jobs: AsyncIterator[Job]) -> AsyncIterator[JobStage]:
        async for job in jobs:
            stage = await self._stages.of(job)
            yield stage
            if stage.state.is_final:
                return


async def _news(states: AsyncIterator[Any], last: str | None, id: Callable[[Any], str]) -> AsyncIterator[Any]:
    async for state in states:
        if id(state) != last:
            last = id(state)
            yield state


async def _rows(
    row: Any, changes: AsyncIterator[Any], closing: asyncio.Event, tick: float | None
) -> AsyncGenerator[Any, None]:
    """The row now and after each change, and with `tick` again after so many seconds without one."""
    closed = asyncio.ensure_future(closing.wait())
    following: asyncio.Future[Any] | None = None
    try:
        while True:
            yield row
            following = following or asyncio.ensure_future(anext(changes))
            await asyncio.wait({following, closed}, timeout=tick, return_when=asyncio.FIRST_COMPLETED)
            if closed.done():
                return
            if following.done():
                row, following = following.result(), None
    except RowNotFoundError:
        return
    finally:
        await uninterrupted(ended(closed, *([following] if following else [])))
