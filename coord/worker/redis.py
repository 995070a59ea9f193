"""Redis as arq sees it: the queue is answered by the pick-up, and a claimed job's bookkeeping from memory.

arq's `Worker` (0.28) asks this of its `redis_pool`: `zrangebyscore` for the ids that are due, then for each a pipeline
that claims it, one that reads it and counts the try, and one that removes it. All of that has happened in one script by
the time arq is given an id, or happens in the next; what arq asks about jobs without a ledger goes to Redis.
`tests/test_arq.py` holds arq to it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from arq.connections import ArqRedis
from arq.constants import abort_jobs_ss, in_progress_key_prefix, job_key_prefix, retry_key_prefix
from redis.asyncio.client import Pipeline
from redis.exceptions import ClusterDownError, OutOfMemoryError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from coord.worker.claims import AGAIN, GONE, TOLD, Claim

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from arq.jobs import Job as ArqJob

    from coord.worker.pickup import Pickup

RETRY = 1.0
"""Seconds between attempts at what arq cannot do without: an error would end its worker."""
AWAY = (RedisConnectionError, RedisTimeoutError, OSError, ReadOnlyError, OutOfMemoryError, ClusterDownError)


class WorkerRedis(ArqRedis):
    """arq's `redis_pool`. Nothing that a worker itself calls raises because Redis is away."""

    pickup: Pickup | None = None
    """Set while the worker runs."""
    ending: asyncio.Task[None] | None = None
    """What closes a shift, the last one perhaps, and at its end every connection."""
    health_check_key = ""

    async def zrangebyscore(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        if self.pickup is None or name != self.pickup.queue:
            return await super().zrangebyscore(name, *args, **kwargs)
        return await self.pickup.jobs(kwargs["num"])

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        return ClaimPipeline(self, transaction, shard_hint)

    async def enqueue_job(self, function: str, *args: Any, **kwargs: Any) -> ArqJob | None:
        """For cron jobs too, which arq's poll enqueues."""
        job: ArqJob | None = await _persistent(lambda: ArqRedis.enqueue_job(self, function, *args, **kwargs))
        return job

    async def zcard(self, name: Any) -> Any:
        """Asked in burst mode, whether anything is left."""
        if self.pickup is None or name != self.pickup.queue:
            return await super().zcard(name)
        return await _persistent(lambda: ArqRedis.zcard(self, name))

    async def zrem(self, name: Any, *values: Any) -> Any:
        """Asked when jobs were aborted."""
        if name != abort_jobs_ss:
            return await super().zrem(name, *values)
        return await _persistent(lambda: ArqRedis.zrem(self, name, *values))

    async def setex(self, name: Any, *args: Any) -> Any:
        """Asked of a job that was enqueued with a number of tries."""
        if not str(name).startswith(retry_key_prefix):
            return await super().setex(name, *args)
        return await _persistent(lambda: ArqRedis.setex(self, name, *args))

    async def delete(self, *names: Any) -> Any:
        """Not the health key, arq's last act: it is for another living worker of this host too, and expires soon."""
        return 0 if names == (self.health_check_key,) else await super().delete(*names)

    async def close(self, close_connection_pool: bool | None = None) -> None:
        """Under the name that redis-py warns of, and arq calls."""
        await self.aclose(close_connection_pool)


class ClaimPipeline(Pipeline):
    """A pipeline that, if it is about a job of the ledger which this worker has claimed, never leaves the process."""

    def __init__(self, redis: WorkerRedis, transaction: bool, shard_hint: str | None) -> None:
        super().__init__(redis.connection_pool, redis.response_callbacks, transaction, shard_hint)
        self._pickup = redis.pickup
        self._ending = redis.ending
        self._claim: Claim | None = None

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        """arq looks whether a job is free and due, watching its claim."""
        if args[0] == "WATCH":
            self._claim = self._claimed(args[1], in_progress_key_prefix)
            self.watching = self._claim is not None
        if self._claim is None:
            return await super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return {"EXISTS": 0, "ZSCORE": self._claim.score}.get(args[0], True)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = [command for command, _ in self.command_stack]
        claim = self._claim or self._subject(commands)
        if claim is None:
            return await self._of_no_claim(commands, raise_on_error)
        if claim.message is None:
            return await self._without_ledger(claim, commands, raise_on_error)
        if self._claim is None and commands[0][0] != "GET":
            assert self._pickup is not None
            finished = any(command[0] == "ZREM" for command in commands)
            self._pickup.end(claim, claim.ending or (GONE if finished else AGAIN))
        await self.reset()  # type: ignore[no-untyped-call]
        return [_answer(claim, command) for command in commands]

    async def _without_ledger(self, claim: Claim, commands: list[Any], raise_on_error: bool) -> list[Any]:
        """What arq has enqueued it also keeps; only its time in the queue is what the claim has made of it."""
        if self._claim is not None:
            await self.reset()  # type: ignore[no-untyped-call]
            return [True for _ in commands]
        if commands[0][0] == "GET":
            return await self._by_redis(raise_on_error)
        assert self._pickup is not None
        if not any(command[0] == "ZREM" for command in commands):
            later = sum(command[2] for command in commands if command[0] == "ZINCRBY")
            self.command_stack = [entry for entry in self.command_stack if entry[0][0] != "ZINCRBY"]
            self.zadd(self._pickup.queue, {claim.id: claim.score + later}, xx=True)
        try:
            return await self._by_redis(raise_on_error)
        finally:
            self._pickup.end(claim, TOLD)

    async def _of_no_claim(self, commands: list[Any], raise_on_error: bool) -> list[Any]:
        """The task's own, or what arq asks at its start, and of aborted jobs, without which it can do."""
        if self._ending not in (None, asyncio.current_task()) and commands and commands[0][0] == "INFO":
            await asyncio.wait([self._ending])
        try:
            return await super().execute(raise_on_error)
        except AWAY:
            match commands:
                case [("INFO", *_), *_]:
                    return [{} if command[0] == "INFO" else "?" for command in commands]
                case [("ZRANGE", key, *_), *_] if key == abort_jobs_ss:
                    return [[] for _ in commands]
            raise

    async def _by_redis(self, raise_on_error: bool) -> list[Any]:
        """A worker that stops waits for Redis no longer: what it could not say, the end of its claim says."""
        stack = self.command_stack

        async def execute() -> list[Any]:
            self.command_stack = [*stack]
            try:
                return await Pipeline.execute(self, raise_on_error)
            except AWAY:
                if self._pickup is not None and self._pickup.draining and stack[0][0][0] != "GET":
                    return []
                raise

        answers: list[Any] = await _persistent(execute)
        return answers

    def _subject(self, commands: list[Any]) -> Claim | None:
        """The claim that arq's reading or removing of a job is about."""
        if commands and commands[0][0] == "GET":
            return self._claimed(commands[0][1], job_key_prefix)
        keys = [key for command in commands if command[0] in ("DEL", "PEXPIRE") for key in command[1:]]
        return next((claim for key in keys if (claim := self._claimed(key, in_progress_key_prefix))), None)

    def _claimed(self, key: Any, prefix: str) -> Claim | None:
        if self._pickup is None or not isinstance(key, str) or not key.startswith(prefix):
            return None
        return self._pickup.claims.get(key.removeprefix(prefix))


def _answer(claim: Claim, command: tuple[Any, ...]) -> Any:
    match command:
        case ("GET", *_):
            return claim
        case ("INCRBY", key, 1) if key == f"{retry_key_prefix}{claim.id}":
            return 1 if claim.message is None else claim.message.attempt
        case ("ZREM", *_):
            return 0
    return True


async def _persistent(call: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        try:
            return await call()
        except AWAY:
            await asyncio.sleep(RETRY)
