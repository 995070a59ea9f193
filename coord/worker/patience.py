"""How arq's own client deals with a Redis that is away, or refuses: it waits, and its worker goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from arq.worker import Worker, async_check_health
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    ExecAbortError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from coord.notify.outage import Outage
from coord.worker.failure import backoff

T = TypeVar("T")

logger = logging.getLogger("arq.coord")

WAITED_OUT = (RedisConnectionError, RedisTimeoutError, OSError, ResponseError)
"""For redis-py, which asks about no more than the class."""
_PASSING = (RedisConnectionError, RedisTimeoutError, OSError, OutOfMemoryError, ReadOnlyError, NoPermissionError)
_PASSING_CODES = ("BUSY ", "CLUSTERDOWN ", "LOADING ", "MASTERDOWN ", "MISCONF ", "NOREPLICAS ", "TRYAGAIN ")
RETRY_PAUSE_SECONDS = (0.1, 2.0)
"""Before the second attempt, and before any later one at most."""
SILENCE_SECONDS = 2.0
"""Without a first answer, after which that is said: arq's connections wait for one without a limit."""


def passes(error: BaseException) -> bool:
    """Whether Redis may well answer otherwise later."""
    if isinstance(error, ExecAbortError):
        return True
    return isinstance(error, _PASSING) or (isinstance(error, ResponseError) and str(error).startswith(_PASSING_CODES))


class Patience(Retry):
    """Retries as long as arq's main task lives, and not at all afterwards: arq's `close` asks Redis once more.

    The main task is the first one that asks. What is watched is not watched any more after a reconnect: in an outage
    a job of arq's own may be begun twice, as it may be anyway.
    """

    def __init__(self) -> None:
        super().__init__(NoBackoff(), -1, WAITED_OUT)  # type: ignore[arg-type]
        self.closing: Callable[[], Awaitable[None]] = _nothing
        """What is still to be done if arq cannot close for want of Redis."""
        self.meanwhile: Callable[[], Awaitable[None]] = _nothing
        """What is to be done between two attempts before the worker has started."""
        self.has_started = False
        self._main: asyncio.Task[Any] | None = None
        self._silence: asyncio.TimerHandle | None = None
        """Of the first answer that is waited for."""
        self._outage = Outage(
            logger, away="Redis does not serve arq, whose own jobs wait", back="Redis serves arq again"
        )

    def __deepcopy__(self, _memo: Any) -> Patience:
        """redis-py gives each connection a copy."""
        return self

    async def takes_over(self, redis: Any) -> None:
        """Have the client make its connections anew, and `greet` on each.

        By Sentinel arq makes a client that knows nothing of its settings' retries.
        """
        pool = redis.connection_pool
        pool.connection_kwargs |= {"retry": self, "retry_on_timeout": True, "retry_on_error": list(WAITED_OUT)}
        pool.connection_kwargs["redis_connect_func"] = self.greet
        await pool.disconnect()
        pool.reset()

    async def greet(self, connection: Any) -> None:
        """What redis-py says on a new connection, and does not try again: a proxy accepts one before it finds that the
        server is away, and closes it.
        """

        async def attempt() -> None:
            if not connection.is_connected:
                connection.redis_connect_func = _only_connected
                try:
                    await connection.connect()
                finally:
                    connection.redis_connect_func = self.greet
            try:
                await connection.on_connect()
            except BaseException:
                await connection.disconnect()
                raise

        await self.call_with_retry(attempt, lambda _error: connection.disconnect())

    async def call_with_retry(self, do: Callable[[], Awaitable[T]], fail: Callable[[RedisError], Any]) -> T:
        """`fail` would give a watched transaction up, which arq does not survive; redis-py reconnects without it."""
        self._begin()
        attempt = 0
        while True:
            attempt += 1
            try:
                answer = await do()
            except WAITED_OUT as error:
                if not passes(error) or self._is_over():
                    await self._gave_up()
                    await fail(error)  # type: ignore[arg-type]
                    raise
                self._outage.report(error)
            else:
                if answer is not None:  # a connection alone is no answer
                    self._outage.report(None)
                    if self._silence is not None:
                        self._silence.cancel()
                        self._outage.report(None, "silence")
                return answer
            if not self.has_started:
                await self.meanwhile()
            await asyncio.sleep(backoff(attempt, RETRY_PAUSE_SECONDS))

    async def _gave_up(self) -> None:
        """arq's `run` has nothing left to do but to close, for which it wants Redis: end as if that were done.

        With the status of its main task, if that has ended with an exit.
        """
        if _is(asyncio.current_task(), Worker.close):
            await self.closing()
            main = self._main
            error = main.exception() if main is not None and main.done() and not main.cancelled() else None
            raise SystemExit(error.code if isinstance(error, SystemExit) else 0)

    def _begin(self) -> None:
        """With the first call in an event loop, which is the main task's."""
        loop = asyncio.get_running_loop()
        if self._main is None or self._main.get_loop() is not loop:
            self._main, self.has_started = asyncio.current_task(), False
            silent = TimeoutError(f"it has not answered for {SILENCE_SECONDS:g} s")
            self._silence = loop.call_later(SILENCE_SECONDS, self._outage.report, silent, "silence")

    def _is_over(self) -> bool:
        return (self._main is not None and self._main.done()) or _is(asyncio.current_task(), async_check_health)


async def _only_connected(_connection: Any) -> None:
    """Said later."""


async def _nothing() -> None:
    """Nothing has been started."""


def _is(task: asyncio.Task[Any] | None, function: Callable[..., Any]) -> bool:
    """Whether the task is a call of that function of arq's: `--check` makes its client by a worker's settings."""
    return task is not None and getattr(task.get_coro(), "__qualname__", "") == function.__qualname__
