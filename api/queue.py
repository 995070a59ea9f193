"""The API's end of the queue, which may be away: then orders are taken, and fulfilled later."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from arq import ArqRedis
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from api.deadline import in_time
from worker.environment import REDIS, redis_url
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SECONDS = 2.0
PING_SECONDS = 1.0

logger = logging.getLogger("uvicorn.shop")  # beneath uvicorn's, so that these lines look like its own
redis = ArqRedis(
    ConnectionPool.from_url(redis_url(), socket_connect_timeout=SECONDS, socket_timeout=SECONDS),
    job_serializer=Settings.job_serializer,
    job_deserializer=Settings.job_deserializer,
)


class QueueUnavailableError(Exception):
    """The queue cannot be reached, so nothing was enqueued."""


async def enqueue(task: Callable[..., Awaitable[None]], *args: Any) -> str:
    """The new job's id. To be called after the commit: a worker may start the job before this returns."""
    try:
        job = await in_time(redis.enqueue_job(task.__qualname__, *args), SECONDS)
    except (RedisError, OSError) as error:
        raise QueueUnavailableError from error
    assert job is not None  # arq: the id was already there; it is random
    return job.job_id


@asynccontextmanager
async def watched() -> AsyncIterator[None]:
    """Say once that Redis is away and once that it is back; close the client at the end."""
    task = asyncio.create_task(_watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await redis.aclose()


async def _watch() -> None:
    reachable = True
    while True:
        try:
            await redis.ping()
        except (RedisError, OSError) as error:
            if reachable:
                logger.warning("Redis is away (%s): %s; orders are taken, not fulfilled", REDIS, str(error).rstrip("."))
            reachable = False
        else:
            if not reachable:
                logger.warning("Redis is back")
            reachable = True
        await asyncio.sleep(PING_SECONDS)
