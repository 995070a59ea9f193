"""Connections to Redis that coord looks after by itself, and not redis-py's pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool
    from redis.asyncio.connection import Connection


def own_connection(pool: ConnectionPool) -> Connection:
    """Made as the pool's are, but in no pool, and without a `socket_timeout`: whoever uses it bounds every wait.

    redis-py would keep that by `asyncio.wait_for`, which takes a task a command and, before Python 3.12, may swallow a
    cancellation (python/cpython#86296): what is told to close would never end.
    """
    connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
    connection.socket_timeout = None
    return connection
