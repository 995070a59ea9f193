"""A connection to Redis for what must be quick: one command at a time, no pool, no retry, and an end to every wait."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from coord.wire import Wire, connected, packed

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

    from coord.outage import Outage

ANSWER_LIMIT = 2.0
"""Seconds after which Redis counts as away."""


class Link:
    """Opened by the first command, and anew by the next one after an error: it may be a replica's by now."""

    def __init__(self, pool: ConnectionPool, outage: Outage) -> None:
        self._pool = pool
        self._outage = outage
        self._wire: Wire | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._stack = AsyncExitStack()
        self._turn = asyncio.Lock()

    async def execute_command(self, *command: Any) -> Any:
        async with self._turn:
            if self._wire is not None:
                with suppress(RedisConnectionError):  # Redis has closed it since, and may well take another
                    return await self._execute(self._wire, command)
            return await self._execute(await self._opened(), command)

    async def _execute(self, wire: Wire, command: tuple[Any, ...]) -> Any:
        self._wire = None
        self._answer = asyncio.get_running_loop().create_future()
        try:
            if wire.end.done():
                raise wire.end.result() or RedisConnectionError("Redis has closed the connection")
            async with asyncio.timeout(ANSWER_LIMIT):
                wire.write(packed(*command))
                answer = await self._answer
            if isinstance(answer, RedisError) and not isinstance(answer, NoScriptError):
                raise answer
        except BaseException:
            await self._stack.aclose()
            raise
        self._wire = wire
        if isinstance(answer, NoScriptError):
            raise answer
        return answer

    async def _opened(self) -> Wire:
        connection = await self._stack.enter_async_context(connected(self._pool, limit=ANSWER_LIMIT))
        wire = Wire(connection, self._heard)
        wire.end.add_done_callback(self._lost)
        return wire

    def _heard(self, message: Any) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _lost(self, end: asyncio.Future[Exception | None]) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(end.result() or RedisConnectionError("Redis has closed the connection"))

    def report(self, error: Exception | None) -> None:
        """Say that Redis is away, or back, once."""
        self._outage.report(error)

    async def close(self) -> None:
        self._wire = None
        await self._stack.aclose()
