"""Connections to Redis that redis-py makes, and that are spoken to without it from then on.

redis-py takes a task's turn for every message, and more time to pack and to parse one than Redis takes to deal with it.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from redis.asyncio import ConnectionPool
    from redis.asyncio.connection import Connection

_NOTHING = object()


@asynccontextmanager
async def connected(pool: ConnectionPool, *, limit: float) -> AsyncIterator[Connection]:
    """A connection as the pool's are, but in no pool, closed at the end; `TimeoutError` after `limit` seconds.

    It has no `socket_timeout`, since redis-py would keep that by `asyncio.wait_for`, which before Python 3.12 may
    swallow a cancellation (python/cpython#86296): what is told to close would never end.
    """
    connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
    connection.socket_timeout = None
    try:
        async with asyncio.timeout(limit):
            await connection.connect()  # type: ignore[no-untyped-call]
        yield connection
    finally:
        with suppress(RedisError, OSError):
            await connection.disconnect(nowait=True)


class Line(asyncio.Protocol):
    """What is written goes out at once, and what comes is given to `data_received` as it comes."""

    def __init__(self, connection: Connection) -> None:
        assert connection._writer is not None  # pinned by tests/test_wire.py
        self.end: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        """Done when the connection is of no use any more; why, or None if nothing is amiss."""
        self._transport = connection._writer.transport
        self._transport.set_protocol(self)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.lose(error or RedisConnectionError("Redis has closed the connection"))

    def lose(self, error: Exception | None) -> None:
        if not self.end.done():
            self.end.set_result(error)


class Wire(Line):
    """Answers and messages go to `heard`, errors among them as exceptions of redis-py."""

    def __init__(self, connection: Connection, heard: Callable[[Any], None]) -> None:
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        """When something last came, on the loop's clock."""
        self._reader = hiredis.Reader(replyError=connection._parser.parse_error, notEnoughData=_NOTHING)
        super().__init__(connection)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        try:
            self._reader.feed(data)
            while (message := self._reader.gets()) is not _NOTHING:
                self._heard(message)
        except Exception as error:  # noqa: BLE001 - nothing that comes can be trusted any more
            self.lose(error)


def packed(*parts: bytes | str | int) -> bytes:
    """A command as Redis reads it."""
    lines = [b"*%d\r\n" % len(parts)]
    for part in parts:
        text = part if isinstance(part, bytes) else str(part).encode()
        lines.append(b"$%d\r\n%b\r\n" % (len(text), text))
    return b"".join(lines)
