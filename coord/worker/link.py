"""A connection to Redis for what must be quick: one command at a time, no pool, no retry, and an end to every wait."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from coord.hints.wire import Wire, connected, packed

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool
    from redis.asyncio.connection import Connection

    from coord.hints.outage import Outage

ANSWER_LIMIT = 2.0
"""Seconds after which Redis counts as away."""


class Link:
    """Opened by the first command, and anew by the next one after an error: it may be a replica's by now."""

    def __init__(self, pool: ConnectionPool, outage: Outage) -> None:
        self._pool = pool
        self._outage = outage
        self._dialogue: _Dialogue | None = None
        self._stack = AsyncExitStack()
        self._turn = asyncio.Lock()

    async def execute_command(self, *command: Any) -> Any:
        async with self._turn:
            if self._dialogue is not None:
                with suppress(RedisConnectionError):  # Redis has closed it since, and may well take another
                    return await self._execute(self._dialogue, command)
            connection = await self._stack.enter_async_context(connected(self._pool, limit=ANSWER_LIMIT))
            return await self._execute(_Dialogue(connection), command)

    async def _execute(self, dialogue: _Dialogue, command: tuple[Any, ...]) -> Any:
        self._dialogue = None
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                answer = await dialogue.ask(command)
            if isinstance(answer, RedisError) and not isinstance(answer, NoScriptError):
                raise answer
        except BaseException:
            await self._stack.aclose()
            raise
        self._dialogue = dialogue
        if isinstance(answer, NoScriptError):
            raise answer
        return answer

    def report(self, error: Exception | None) -> None:
        """Say that Redis is away, or back, once."""
        self._outage.report(error)

    async def close(self) -> None:
        self._dialogue = None
        await self._stack.aclose()


class _Dialogue(Wire):
    """A command, then its answer; what comes from an earlier connection is none of them."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection, self._heard_answer)
        self._answer: asyncio.Future[Any] | None = None
        self.end.add_done_callback(self._ended)

    async def ask(self, command: tuple[Any, ...]) -> Any:
        """The answer, or the error that Redis answers."""
        if self.end.done():
            raise self._why()
        self._answer = asyncio.get_running_loop().create_future()
        self.write(packed(*command))
        return await self._answer

    def _heard_answer(self, message: Any) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _ended(self, _end: asyncio.Future[Exception | None]) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._why())

    def _why(self) -> Exception:
        return self.end.result() or RedisConnectionError("Redis has closed the connection")
