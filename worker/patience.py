"""A worker that is started before its servers are there."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from worker.environment import REDIS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger("arq.shop")  # beneath arq's, so that these lines look like its own
T = TypeVar("T")


class Patience(Retry):
    """Until the worker has started, waits for Redis as long as it takes, and says so once; afterwards never retries.

    Of all that arq lets an application bring, this alone is called before arq needs Redis. So the database is opened
    here: a worker that cannot use it says that, and ends, while Redis is away too.
    """

    def __init__(self, first: Callable[[], Awaitable[None]]) -> None:
        super().__init__(NoBackoff(), retries=0)
        self._first = first
        self._opened = self._waited = self._started = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # redis-py copies it for every connection, but a process starts once

    async def call_with_retry(self, do: Callable[[], Awaitable[T]], fail: Callable[[RedisError], Any]) -> T:
        if self._started:
            return await super().call_with_retry(do, fail)
        if not self._opened:
            await self._first()
            self._opened = True
        failures = 0
        while True:
            try:
                return await do()
            except (OSError, RedisError) as error:
                self._say_once(error)
                with suppress(RedisError):
                    await fail(error)  # type: ignore[arg-type]  # drops the connection and may raise what it was given
            failures += 1
            await asyncio.sleep(min(0.05 * 2 ** min(failures, 9), 5.0))

    def started(self) -> None:
        self._started = True
        if self._waited:
            logger.warning("Redis is back")

    def _say_once(self, error: Exception) -> None:
        if not self._waited:
            self._waited = True
            logger.warning("waiting for Redis (%s): %s", REDIS, str(error) or type(error).__name__)
