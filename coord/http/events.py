"""Streams of a row's states: the one now, then the newest after each change, until somebody has had enough."""

from __future__ import annotations

import asyncio
import signal
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation
from sqlalchemy import inspect

from coord.cancellation import uninterrupted
from coord.engine import engine_of, prepare
from coord.errors import RowNotFoundError, TooManyWaitersError
from coord.http.disconnect import ended
from coord.waiting import watch_row

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.target import M

MAX_STREAMS = 1_000


class EventStreams:
    """The event streams of one process: a cap on them, and their end when the server is told to stop.

    Each reads through a session of its own: FastAPI lets a stream begin while the request's session still commits.

    streams = EventStreams(session_maker, max_streams=1_000)
    app = FastAPI(lifespan=streams.lifespan)

    @app.get("/orders/{order_id}/events", response_class=EventSourceResponse)
    async def events(order: KnownOrder, stream: Annotated[Stream, Depends(streams.stream)]):
        async for order in stream.rows(order, id=lambda order: str(order.version)):
            yield ServerSentEvent(data=order, id=str(order.version))
    """

    def __init__(self, session_maker: async_sessionmaker[AsyncSession], *, max_streams: int = MAX_STREAMS) -> None:
        prepare(engine_of(session_maker))
        self._session_maker = session_maker
        self._max = max_streams
        self._open = 0
        self._closing: asyncio.Event | None = None

    @asynccontextmanager
    async def lifespan(self, _app: Any) -> AsyncIterator[None]:
        """End the streams when the server is signalled to stop: it would wait for them before it ends this block."""
        self._closing = closing = asyncio.Event()
        loop = asyncio.get_running_loop()
        with _signalled(lambda: loop.call_soon_threadsafe(closing.set)):
            try:
                yield
            finally:
                closing.set()

    async def stream(self, request: Request) -> AsyncGenerator[Stream, None]:
        """A dependency: one of the streams, until the response has ended."""
        if self._open >= self._max:
            raise TooManyWaitersError(f"{self._open} event streams are as many as this process serves")
        self._open += 1
        try:
            yield Stream(request, self._session_maker, self._closing or asyncio.Event())
        finally:
            self._open -= 1


class Stream:
    """One client's stream, resumed after `Last-Event-ID`."""

    def __init__(
        self, request: Request, session_maker: async_sessionmaker[AsyncSession], closing: asyncio.Event
    ) -> None:
        self.last_id = request.headers.get("last-event-id")
        self._session_maker = session_maker
        self._closing = closing

    async def rows(
        self,
        row: M,
        *,
        id: Callable[[M], str],
        columns: Sequence[Any] | None = None,
        final: Callable[[M], bool] | None = None,
    ) -> AsyncIterator[M]:
        """The row, unless `id` of it is the client's last; then its newest state after each change.

        Ends after a state that is `final`, when the row is deleted, and when the server stops. No connection is held
        between two states.
        """
        if id(row) != self.last_id:
            yield row
        if final is not None and final(row):
            return
        mapper = inspect(type(row))
        key = tuple(mapper.primary_key_from_instance(row))
        async with (
            self._session_maker() as session,
            watch_row(session, type(row), key, columns=columns, since=row) as states,
        ):
            while (state := await self._next(states)) is not None:
                yield state
                if final is not None and final(state):
                    return

    async def _next(self, states: AsyncIterator[M]) -> M | None:
        """None when there are no more."""
        following = asyncio.ensure_future(anext(states))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({following, closing}, return_when=asyncio.FIRST_COMPLETED)
            return following.result() if following.done() else None
        except RowNotFoundError:
            return None
        finally:
            await uninterrupted(ended(following, closing))


@contextmanager
def _signalled(tell: Callable[[], object]) -> Iterator[None]:
    """Be told of SIGTERM and SIGINT, beside whoever handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        tell()
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
