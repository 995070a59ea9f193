"""The API's end of the queue, which may be away: then orders are taken, and fulfilled later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arq import ArqRedis
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from api.deadline import in_time
from worker.environment import redis_url
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SECONDS = 2.0

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
