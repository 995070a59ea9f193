"""A connection to Redis for what must be quick: one command at a time, no pool, no retry, and an end to every wait."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

from coord.redis_connection import own_connection

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool
    from redis.asyncio.connection import Connection

    from coord.outage import Outage

ANSWER_LIMIT = 2.0
"""Seconds after which Redis counts as away."""


class Link:
    """Opened by the first command, and anew by the next one after an error: it may be a replica's by now."""

    def __init__(self, pool: ConnectionPool, outage: Outage) -> None:
        self._pool = pool
        self._outage = outage
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    async def execute_command(self, *command: Any) -> Any:
        async with self._turn:
            if self._connection is not None:
                with suppress(RedisConnectionError):  # Redis has closed it since, and may well take another
                    return await self._execute(self._connection, command)
            return await self._execute(own_connection(self._pool), command)

    async def _execute(self, connection: Connection, command: tuple[Any, ...]) -> Any:
        self._connection = None
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                await connection.send_command(*command, check_health=False)
                answer = await connection.read_response(disable_decoding=True, disconnect_on_error=False)
        except NoScriptError:
            self._connection = connection
            raise
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection = connection
        return answer

    def report(self, error: Exception | None) -> None:
        """Say that Redis is away, or back, once."""
        self._outage.report(error)

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
            self._connection = None
