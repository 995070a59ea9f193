"""What a worker does before arq connects: the tables, then Redis, however long it is away."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any, Self, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from worker.database import open_database
from worker.environment import REDIS, redis_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ANSWER_SECONDS = 2.0

logger = logging.getLogger("arq.shop")  # beneath arq's, so that these lines look like its own
T = TypeVar("T")


class AtFirstConnection(Retry):
    """Never retries, but does something before the first connection: arq has no hook of its own that is so early.

    So a worker that cannot use its database says that, and ends, while Redis is away too.
    """

    def __init__(self, first: Callable[[], Awaitable[None]]) -> None:
        super().__init__(NoBackoff(), retries=0)
        self._first: Callable[[], Awaitable[None]] | None = first

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # redis-py copies it for every connection, but a process starts once

    async def call_with_retry(self, do: Callable[[], Awaitable[T]], fail: Callable[[RedisError], Any]) -> T:
        first, self._first = self._first, None
        if first is not None:
            await first()
        return await super().call_with_retry(do, fail)


async def open_shop() -> None:
    await open_database()
    await redis_answers()


async def redis_answers() -> None:
    """Wait until Redis does its work, with backoff; say once that it is waited for, and once that it is back."""
    probe = Redis.from_url(redis_url(), socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS)
    async with probe as redis:
        for failures in itertools.count():
            try:
                await redis.ping()
            except (RedisError, OSError) as error:
                if failures == 0:
                    logger.warning("waiting for Redis (%s): %s", REDIS, str(error).rstrip("."))
            else:
                if failures:
                    logger.warning("Redis is back")
                return
            await asyncio.sleep(min(0.1 * 2 ** min(failures, 9), 5.0))
