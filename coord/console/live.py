"""What the pages show, read once an interval for all who look, and the event stream that sends it anew."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import func, select

from coord.cancellation import interruptible
from coord.http.interruption import stop_observed
from coord.jobs.model import execute
from coord.retryable import is_server_away, sqlstate_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Hashable

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    Read = Callable[[AsyncSession], Awaitable[Any]]

T = TypeVar("T")

logger = logging.getLogger("coord.console")

READ_TIMEOUT_SECONDS = 3.0
"""Of a statement, by PostgreSQL; the whole read may take twice that."""
DEFAULT_SHARE = 0.1
"""Of a core of PostgreSQL's that one read may take, repeated: a slow one is repeated less often."""
QUERY_CANCELED = "57014"
"""Of a statement that took too long (appendix A of PostgreSQL's manual)."""
MAX_KEPT = 200
"""Reads of different pages and filters that are remembered."""
MAX_STREAM_SECONDS = 60.0


class UnreadableError(Exception):
    """The ledger cannot be read at present, or not in time; in words for whoever looks."""

    def __init__(self, said: str, *, is_outage: bool = False) -> None:
        super().__init__(said)
        self.is_outage = is_outage
        """Whether PostgreSQL was away, and has done no work for it."""


class Reads:
    """Reads of the ledger, each in a transaction of its own, each at most once an interval whoever asks for it.

    Nothing runs by itself: where nobody asks, nothing is read, and nobody holds a connection between two reads.
    """

    def __init__(self, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self.session_maker = session_maker
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._answered_at = 0.0
        """When PostgreSQL last answered, on the monotonic clock."""

    async def get(self, key: Hashable, read: Read, *, interval: float, share: float = DEFAULT_SHARE) -> Any:
        """What `read` gives, or gave less than `interval` seconds ago. Raises `UnreadableError`."""
        kept = self._kept.setdefault(key, _Kept())
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        async with kept.lock:
            if monotonic() >= kept.expires:
                await self._renew(kept, read, interval, share)
        if kept.error is not None:
            raise UnreadableError(*kept.error.args)
        return kept.value

    def forget(self) -> None:
        """Something was changed: what is shown next is read anew."""
        self._kept.clear()

    async def _renew(self, kept: _Kept, read: Read, interval: float, share: float) -> None:
        """An outage's error is kept for an interval alone, and until the first read that succeeds."""
        kept.value = kept.error = None
        began = monotonic()
        try:
            kept.value = await self._read(read)
        except UnreadableError as error:
            kept.error = error
            if error.is_outage:
                kept.expires = monotonic() + interval
                return
        else:
            for other in self._kept.values():
                if other.error is not None and other.error.is_outage:
                    other.expires = 0.0
        kept.expires = began + max(interval, (monotonic() - began) / share)

    async def _read(self, read: Read) -> Any:
        began = monotonic()
        try:
            return await interruptible(self._in_a_session(read), limit=2 * READ_TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise UnreadableError("PostgreSQL did not answer in time", is_outage=self._answered_at < began) from error
        except Exception as error:
            logger.warning("The console cannot read the ledger: %s", error)
            said = f"PostgreSQL cannot be read ({type(error).__name__}); the log says why"
            is_outage = is_server_away(error) and sqlstate_of(error) != QUERY_CANCELED
            raise UnreadableError(said, is_outage=is_outage) from error

    async def _in_a_session(self, read: Read) -> Any:
        milliseconds = str(round(READ_TIMEOUT_SECONDS * 1000))
        async with self.session_maker() as session:
            await session.run_sync(execute, select(func.set_config("statement_timeout", milliseconds, True)))
            self._answered_at = monotonic()
            return await read(session)


@dataclass(slots=True)
class _Kept:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    value: Any = None
    error: UnreadableError | None = None
    expires: float = 0.0
    """On the monotonic clock."""


async def events(show: Callable[[], Awaitable[str]], *, interval: float, last: str | None) -> AsyncIterator[str]:
    """The page now, unless `last` is its id, then as it is after each change; until the server stops, or a minute.

    What is sent without a change is a comment, by which a server finds out that its client has left.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + MAX_STREAM_SECONDS
    yield "retry: 2000\n\n"
    with stop_observed() as stopped:
        while not stopped.done() and loop.time() < end:
            try:
                text, kind = await show(), "page"
            except UnreadableError as error:
                text, kind = str(error), "away"
            tag = hashlib.sha256(f"{kind}{text}".encode()).hexdigest()[:16]
            yield ": unchanged\n\n" if tag == last else f"id: {tag}\nevent: {kind}\ndata: {json.dumps(text)}\n\n"
            last = tag
            await asyncio.wait({stopped}, timeout=max(0, min(interval, end - loop.time())))
