"""Streams of a row's states: the one now, then the newest after each change, until somebody has had enough."""

from __future__ import annotations

import asyncio
import signal
import threading
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header
from sqlalchemy import inspect

from coord.cancellation import uninterrupted
from coord.engine import engine_of, prepare
from coord.errors import RowNotFoundError, TooManyWaitersError
from coord.http.disconnect import ended
from coord.waiting import watch_row

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

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
    """

    def __init__(self, session_maker: async_sessionmaker[AsyncSession], *, max_streams: int = MAX_STREAMS) -> None:
        prepare(engine_of(session_maker))
        self._session_maker = session_maker
        self._max = max_streams
        self._open = 0
        self._closing: asyncio.Event | None = None

    def of(
        self,
        row: Callable[..., Any],
        *,
        id: Callable[[Any], str],
        columns: Sequence[Any] | None = None,
        final: Callable[[Any], bool] | None = None,
    ) -> Callable[..., AsyncGenerator[AsyncIterator[Any], None]]:
        """A dependency: the states of the row that the dependency `row` gives, as it is, then after each change.

        A row whose `id` is the client's `Last-Event-ID` is no news. Ends after a state that is `final`, when the row is
        deleted, and when the server stops. What cannot begin is refused before the answer begins: one stream too many
        is a `TooManyWaitersError`. Holds no connection, and has a session of its own: the request's may still commit.
        """

        async def states(
            now: Any = Depends(row), last: Annotated[str | None, LAST_EVENT_ID] = None
        ) -> AsyncGenerator[AsyncIterator[Any], None]:
            key = tuple(inspect(type(now)).primary_key_from_instance(now))
            with self._place():
                async with (
                    self._session_maker() as session,
                    watch_row(session, type(now), key, columns=columns, since=now) as changes,
                ):
                    own = await session.merge(now, load=False)  # a commit of the request's may expire the other
                    async with aclosing(self._states(own, changes, final, skip=id(own) == last)) as stream:
                        yield stream

        return states

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

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._open >= self._max:
            raise TooManyWaitersError(f"{self._open} event streams are as many as this process serves")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _states(
        self, now: Any, changes: AsyncIterator[Any], final: Callable[[Any], bool] | None, *, skip: bool
    ) -> AsyncGenerator[Any, None]:
        if not skip:
            yield now
        closing = asyncio.ensure_future((self._closing or asyncio.Event()).wait())
        state: Any = now
        try:
            while state is not None and (final is None or not final(state)):
                state = await _next(changes, closing)
                if state is not None:
                    yield state
        finally:
            closing.cancel()


async def _next(changes: AsyncIterator[Any], closing: asyncio.Future[Any]) -> Any:
    """None when there are no more."""
    following = asyncio.ensure_future(anext(changes))
    try:
        await asyncio.wait({following, closing}, return_when=asyncio.FIRST_COMPLETED)
        return following.result() if following.done() else None
    except RowNotFoundError:
        return None
    finally:
        await uninterrupted(ended(following))


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
