"""One worker from its start to its end: what is open meanwhile, in which order it stops, and how long that may take."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, inspect
from sqlalchemy.pool import QueuePool

from coord.coordinator import Coordinator
from coord.database.engine import engine_of
from coord.jobs.ids import new_id
from coord.jobs.model import Cancellation, job_mapper, jobs
from coord.notify.outage import Outage
from coord.worker.executor import Executor
from coord.worker.fetcher import Fetcher, Gate
from coord.worker.finalizer import Finalizer
from coord.worker.freshness import Freshness, RedisClock
from coord.worker.maintenance.canceller import Canceller
from coord.worker.maintenance.heartbeat import Heartbeat, another
from coord.worker.maintenance.leader import Leader
from coord.worker.maintenance.pruner import Pruner
from coord.worker.maintenance.reconciler import Reconciler
from coord.worker.maintenance.registry import WorkerRegistry
from coord.worker.maintenance.rescuer import Rescuer, lock_of
from coord.worker.maintenance.rows import QueuedJobs
from coord.worker.maintenance.scheduler import Scheduler
from coord.worker.maintenance.ticker import Ticker
from coord.worker.maintenance.turnkeeper import TurnKeeper
from coord.worker.running import RunningJobs
from coord.worker.turns import Turns

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.config import WorkerConfig

logger = logging.getLogger("arq.coord")

AWAY, BACK = "Redis does not serve this worker, jobs wait", "Redis serves this worker again"
CANCELLED_SECONDS = 5.0
"""For cancelled tasks to roll back, and for their jobs to be handed back."""
ABANDONED_SECONDS = 1.0
"""For tasks that do not end when they are cancelled."""
BURST_SECONDS = 0.2
"""Between two looks whether there is still something due."""


class Lifecycle:
    """Started and stopped once. `context` is what tasks find in their ctx."""

    def __init__(self, config: WorkerConfig, context: dict[Any, Any]) -> None:
        self._config = config
        self._context = context
        self._stack = AsyncExitStack()
        self._hurry = asyncio.Event()
        self.running: RunningJobs | None = None
        self.fetcher: Fetcher | None = None
        self.heartbeat: Heartbeat | None = None
        self._executor: Executor | None = None
        self.registry: WorkerRegistry | None = None
        self._queued: QueuedJobs | None = None

    async def start(self) -> None:
        """Return when jobs are taken; what has been opened is closed if that fails."""
        _warn_of_small_pool(engine_of(self._config.session_maker).pool, self._config.max_jobs)
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        logger.info("Takes jobs of the queue %s, %d at a time", self._config.queue, self._config.max_jobs)

    def hurry(self) -> None:
        """Leave no more grace."""
        self._hurry.set()

    async def stop(self, *, burst: bool = False) -> None:
        """Take nothing more, leave running jobs their grace, and hand back what has not ended by then.

        In a burst what is due in the ledger is run first.
        """
        if self.fetcher is not None and self.running is not None and self.heartbeat is not None:
            if burst:
                await self._run_what_is_due()
            self.heartbeat.board.stopping = True
            self.fetcher.drain()
            logger.info("This worker stops, leaving %d running jobs %g s", len(self.running), self._config.grace)
            await self._ended(self._config.grace, hurry=True)
            self.running.stop()
            await self._ended(CANCELLED_SECONDS, hurry=False)
            await self.running.abandon(ABANDONED_SECONDS)
        await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> None:
        config, worker, keys = self._config, new_id(), self._config.keys
        outage = Outage(logger, away=AWAY, back=BACK)
        maintenance, redis, feed = self._connections(stack)
        engine = maintenance.execution_options(isolation_level="AUTOCOMMIT")
        coordinator = Coordinator(config.session_maker, redis=redis, namespace=config.namespace)
        coordinator.outage = outage
        await stack.enter_async_context(coordinator)
        clock = RedisClock()
        registry = self.registry = WorkerRegistry(engine, config.queue, worker)
        freshness = Freshness(engine, clock, lambda: registry.held_elsewhere)
        heartbeat = self.heartbeat = await stack.enter_async_context(
            Heartbeat(config, worker, freshness.tick, lambda: registry.is_paused)
        )
        numbers = {name: number for number, name in enumerate(config.tasks)}
        running = self.running = heartbeat.running = RunningJobs(heartbeat.board, config.max_jobs, numbers)
        finalizer = Finalizer(config.session_maker, worker)
        turns = Turns(engine, redis, config.namespace)
        executor = self._executor = Executor(config, running, finalizer, self._context, turns, lock_of(worker))
        stack.push_async_callback(executor.abandon)
        gate = Gate(is_paused=lambda: registry.is_paused, is_credible=lambda: heartbeat.is_credible)
        fetcher = self.fetcher = Fetcher(feed, keys, running, executor, freshness, turns, gate, outage)
        leader = Leader(engine, redis, config.queue, worker, clock, heartbeat.board, lambda: fetcher.is_served)
        scheduler = Scheduler(engine, redis, keys, lambda: leader.is_leader)
        finalizer.on_put_off = scheduler.expect
        published = partial(coordinator.publish, job_mapper)
        stack.push_async_callback(_resign, leader)
        for loop in (
            registry,
            leader,
            canceller := Canceller(engine, running),
            scheduler,
            Reconciler(engine, redis, keys, clock, lambda: leader.is_leader, scheduler.start_over),
            Rescuer(maintenance, redis, keys, registry, lambda: leader.is_leader, config.attempts_of, published),
            *([Ticker(engine, config.session_maker, config.queue, config.periodic)] if config.periodic else []),
            TurnKeeper(engine, turns, lambda: leader.is_leader),
            Pruner(engine, keep=config.keep, is_leader=lambda: leader.is_leader),
        ):
            await stack.enter_async_context(loop)
        coordinator.listen(coordinator.channels.table(inspect(Cancellation), ()), canceller)
        self._queued = QueuedJobs(engine, config.queue)
        await stack.enter_async_context(fetcher)

    def _connections(self, stack: AsyncExitStack) -> tuple[AsyncEngine, Redis, Redis]:
        """For maintenance in PostgreSQL, for that in Redis, and for the pops that block; closed with the stack."""
        maintenance = another(engine_of(self._config.session_maker))
        stack.push_async_callback(maintenance.dispose)
        redis, feed = self._config.address.client(), self._config.address.client()
        for client in (redis, feed):
            stack.push_async_callback(client.aclose)
        return maintenance, redis, feed

    async def _ended(self, limit: float, *, hurry: bool) -> None:
        """Return when no job runs any more, or the time is up, or somebody is in a hurry."""
        assert self.running is not None
        deadline = asyncio.get_running_loop().time() + limit
        while len(self.running) and asyncio.get_running_loop().time() < deadline:
            if hurry and self._hurry.is_set():
                return
            await asyncio.sleep(0.02)

    async def _run_what_is_due(self) -> None:
        """Until nothing is due that this worker could run, and nobody else runs: the reconciler hands it over."""
        assert self._queued is not None
        assert self.running is not None
        assert self.registry is not None
        due = jobs.c.scheduled_at <= func.now(), jobs.c.task.in_([*self._config.tasks])
        while not self._hurry.is_set():
            found = {row.id for row in await self._queued.ids(*due)}
            found -= {job_id for job_id, _ in self.registry.held_elsewhere}
            if not found and not len(self.running):
                return
            await asyncio.sleep(BURST_SECONDS)


def _warn_of_small_pool(pool: Any, max_jobs: int) -> None:
    if isinstance(pool, QueuePool) and 0 < pool.size() < max_jobs:
        logger.warning(
            "The engine's pool keeps %d connections for %d jobs at a time, which will wait for them: pool_size=%d",
            pool.size(),
            max_jobs,
            max_jobs,
        )


async def _resign(leader: Leader) -> None:
    try:
        async with asyncio.timeout(CANCELLED_SECONDS):
            await leader.resign()
    except Exception as error:  # noqa: BLE001 - the lease ends by itself
        logger.debug("The lease could not be given up: %s", error)
