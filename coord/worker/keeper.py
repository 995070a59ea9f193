"""The keeper: a thread that says that this worker lives, and looks after the jobs of those that do not.

A thread of its own, with connections of its own, since a task may keep the event loop busy for long and is alive.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import Engine, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from coord.cancellation import cleaned_up
from coord.jobs.model import JobState, cancellations, jobs, workers
from coord.notify.outage import Outage
from coord.worker.census import DEAD, NEVER, Census
from coord.worker.pickup import LEASE
from coord.worker.reconciler import Reconciler
from coord.worker.scripts import renew

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from redis.asyncio import ConnectionPool
    from sqlalchemy import Delete, Insert

    from coord.notify.channels import Channels
    from coord.worker.claims import Claims

logger = logging.getLogger("arq.coord")

ROUND = 0.5
"""Seconds between two looks at who lives."""
BEAT = 2.0
"""Seconds between two heartbeats."""
CREDIBLE = 5.0
"""Seconds since the last heartbeat after which others may soon take this worker for dead."""
RECONCILE_LIMIT = 60.0
"""Seconds after which the comparison with Redis begins anew."""
ROUND_LIMIT = 5.0
"""Seconds after which a round is given up: a server may be gone without a word."""
HEALTHY = 6
"""Seconds that a heartbeat counts for arq's health check."""
STUCK = 5.0
"""Seconds since arq last asked for work after which the worker is not healthy."""


class Identity(NamedTuple):
    """Which worker this is, and where its jobs come from."""

    id: UUID
    queue: str
    """Its name in the ledger."""
    key: str
    """Its sorted set in Redis."""
    health_key: str
    channels: Channels
    attempts: int
    """How many a job has that says nothing else."""
    tries: Mapping[str, int]
    """The same by task, where its function says something else."""
    keep: float
    """Seconds that the ledger keeps what has ended."""


class Keeper:
    """Started once the tables are there; stopped, it takes the worker off the list."""

    def __init__(
        self,
        identity: Identity,
        engine: AsyncEngine,
        redis: Callable[[], ConnectionPool],
        claims: Claims,
        *,
        cancel: Callable[[str], None],
        polled: Callable[[], float],
    ) -> None:
        self.identity = identity
        self._engine = engine
        self._redis = redis
        self._claims = claims
        self._cancel = cancel
        self._polled = polled
        self._census = Census(identity)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._stopping = self._looks = False
        self._beaten = self._told = self._renewed = NEVER
        self._outage = Outage(
            logger, away="PostgreSQL is away, jobs cannot be looked after", back="PostgreSQL answers again"
        )

    def is_credible(self) -> bool:
        """Whether others know that this worker lives. From any thread."""
        return time.monotonic() - self._beaten < CREDIBLE

    async def start(self) -> None:
        """Return once the worker is on the list; raises what keeps it off."""
        began = time.monotonic()
        try:
            await self._write(insert(workers).values(self._row()))
        except asyncio.CancelledError:
            await cleaned_up(self._write(self._off_the_list()))  # it may have been written all the same
            raise
        self._beaten = began
        self._thread = threading.Thread(target=self._main, name="coord keeper", daemon=True)
        self._thread.start()

    async def _write(self, statement: Insert | Delete) -> None:
        """Before the thread's own connections are there."""
        engine = _another(self._engine)
        try:
            async with engine.connect() as connection:
                await connection.execute(statement)
        finally:
            await engine.dispose()

    async def stop(self) -> None:
        """Return when the thread has ended, or does not within some seconds."""
        self._stopping = True
        self.nudge()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 2 * ROUND_LIMIT)

    def nudge(self) -> None:
        """Begin the next round now. From any thread."""
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None and not loop.is_closed():
            loop.call_soon_threadsafe(wake.set)

    def _main(self) -> None:
        asyncio.run(self._keep_going())

    async def _keep_going(self) -> None:
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            engine = _another(self._engine)
            stack.push_async_callback(engine.dispose)
            redis = await stack.enter_async_context(Redis.from_pool(self._redis()))
            looking_after = asyncio.create_task(self._look_after(Reconciler(self.identity, engine, redis)))
            stack.push_async_callback(self._ended, looking_after)
            while not self._stopping:
                self._wake.clear()
                await self._guarded(self._round(engine))
                await self._guarded(self._tell_redis(redis))
                await self._pause()
            await self._guarded(self._leave(engine, redis))

    async def _look_after(self, reconciler: Reconciler) -> None:
        """Beside the rounds: with much to compare it may take long, and the others have to be watched steadily.

        At most a fifth of the processor's time, as tasks do not have it meanwhile. To wait, or be frozen, takes none.
        """
        while not self._stopping:
            began = time.thread_time()
            if self._census.leads:
                self._looks = True
                await self._guarded(reconciler.look_after(self._census), limit=RECONCILE_LIMIT)
                self._looks = False
            if not self._stopping:
                await asyncio.sleep(max(ROUND, 4 * (time.thread_time() - began)))

    async def _ended(self, looking_after: asyncio.Task[None]) -> None:
        """Let it finish if it is at it: to cancel a statement takes a connection more, and may lose one."""
        if self._looks:
            await asyncio.wait([looking_after], timeout=ROUND)
        while not looking_after.done():  # redis-py may swallow a cancellation; see coord.notify.client
            looking_after.cancel()
            await asyncio.wait([looking_after], timeout=ROUND)

    async def _pause(self) -> None:
        assert self._wake is not None
        timer = asyncio.get_running_loop().call_later(ROUND, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    async def _guarded(self, work: Coroutine[Any, Any, bool], *, limit: float = ROUND_LIMIT) -> None:
        """What fails is done again in the next round. `work` says whether it has heard of PostgreSQL."""
        try:
            async with asyncio.timeout(limit):
                answered = await work
        except RedisError as error:
            logger.debug("Redis is away: %s", error)  # the pick-up says so aloud
        except Exception as error:  # noqa: BLE001 - whatever it is, the heartbeat goes on
            self._outage.report(error)
        else:
            if answered:
                self._outage.report(None)

    async def _round(self, engine: AsyncEngine) -> bool:
        """Each statement by itself: in a transaction, a worker that is frozen would keep its row from who buries it."""
        held = self._jobs()
        now = time.monotonic()
        async with engine.connect() as connection:
            if now - self._beaten >= BEAT - ROUND / 2:
                await self._beat(connection, held)
                self._beaten = now
            for job_id in await _unwanted(connection, held):
                self._cancel(str(job_id))
            await self._census.take(connection)
        return True

    async def _tell_redis(self, redis: Any) -> bool:
        """That this worker is well, and that its claims last."""
        now = time.monotonic()
        if self._told != self._beaten and now - self._polled() < STUCK:
            await redis.set(self.identity.health_key, _health(len(self._claims.all())), px=HEALTHY * 1000)
            self._told = self._beaten
        if now - self._renewed > LEASE / 3:
            ids = [claim.id for claim in self._claims.all()]
            if ids:
                await renew.run(redis, self.identity.key, str(self.identity.id), int(LEASE * 1000), *ids)
            self._renewed = now
        return False

    async def _beat(self, connection: Any, held: dict[str, Any]) -> None:
        beaten = await connection.execute(
            update(workers)
            .where(workers.c.id == self.identity.id)
            .values(beats=workers.c.beats + 1, beat_at=func.clock_timestamp(), jobs=held)
        )
        if not beaten.rowcount:
            logger.warning("This worker was taken for dead and its jobs were given to others; it goes on with new ones")
            await connection.execute(insert(workers), self._row())

    async def _leave(self, engine: AsyncEngine, redis: Any) -> bool:
        here = (workers.c.queue == self.identity.queue) & (workers.c.host == socket.gethostname())
        alive = workers.c.beat_at > func.clock_timestamp() - timedelta(seconds=DEAD)
        async with engine.connect() as connection:
            await connection.execute(self._off_the_list())
            others = await connection.scalar(select(func.count()).select_from(workers).where(here, alive))
        if not others:
            await redis.delete(self.identity.health_key)
        return True

    def _off_the_list(self) -> Delete:
        return delete(workers).where(workers.c.id == self.identity.id)

    def _row(self) -> dict[str, Any]:
        return {
            "id": self.identity.id,
            "queue": self.identity.queue,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "jobs": self._jobs(),
        }

    def _jobs(self) -> dict[str, Any]:
        """What it runs, as the heartbeat says."""
        found = {}
        for claim in self._claims.all():
            if claim.message is not None:
                attempt = claim.attempt
                found[claim.id] = {"attempt": claim.message.attempt}
                if attempt is not None and attempt.progress is not None:
                    found[claim.id]["progress"] = attempt.progress
        return found


async def _unwanted(connection: Any, held: dict[str, Any]) -> list[UUID]:
    """Those of the jobs that somebody has cancelled."""
    if not held:
        return []
    ids = [UUID(job_id) for job_id in held]
    ended = select(jobs.c.id).where(jobs.c.id.in_(ids), jobs.c.state == JobState.CANCELLED)
    wished = select(cancellations.c.job_id).where(cancellations.c.job_id.in_(ids))
    return list(await connection.scalars(ended.union_all(wished)))


def _another(engine: AsyncEngine) -> AsyncEngine:
    """An engine for another event loop, whose connections are made as this one's are, and commit each statement."""
    sync = engine.sync_engine
    another = AsyncEngine(Engine(sync.pool.recreate(), sync.dialect, sync.url))
    return another.execution_options(isolation_level="AUTOCOMMIT")


def _health(ongoing: int) -> str:
    return f"{time.strftime('%b-%d %H:%M:%S')} j_ongoing={ongoing}"
