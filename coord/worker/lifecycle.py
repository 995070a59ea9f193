"""One worker from its start to its end: what is open meanwhile, in which order it stops, and how long that may take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import AsyncExitStack, closing
from typing import Any

from sqlalchemy import func, inspect
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from coord.coordinator import Coordinator
from coord.database.engine import another, dispose
from coord.database.lost_answers import LostAnswers
from coord.jobs.model import Cancellation, jobs, ledger_engine
from coord.retryable import is_retryable
from coord.worker.config import SPARE_CONNECTIONS, WorkerConfig
from coord.worker.executor import Executor
from coord.worker.fetcher import Fetcher
from coord.worker.finalizer import Finalizer
from coord.worker.maintenance.beat import Board
from coord.worker.maintenance.canceller import Canceller
from coord.worker.maintenance.heartbeat import Heartbeat
from coord.worker.maintenance.leader import Leader
from coord.worker.maintenance.loops import Loop
from coord.worker.maintenance.pruner import Pruner
from coord.worker.maintenance.reconciler import Reconciler
from coord.worker.maintenance.registry import WorkerRegistry
from coord.worker.maintenance.rescuer import Rescuer
from coord.worker.maintenance.rows import QueuedJobs
from coord.worker.maintenance.scheduler import Scheduler
from coord.worker.maintenance.ticker import Ticker
from coord.worker.maintenance.turnkeeper import TurnKeeper
from coord.worker.running import RunningJobs
from coord.worker.state import WorkerState
from coord.worker.stopping import also_on_signal
from coord.worker.turns import Turns

logger = logging.getLogger("arq.coord")

CANCELLED_SECONDS = 5.0
"""For cancelled tasks to roll back, and for their jobs to be handed back."""
ABANDONED_SECONDS = 1.0
"""For tasks that do not end when they are cancelled."""
BURST_SECONDS = 0.2
"""Between two looks whether there is still something due."""


class Lifecycle:
    """Started and stopped once. `context` is what tasks find in their ctx."""

    state: WorkerState
    registry: WorkerRegistry
    heartbeat: Heartbeat
    fetcher: Fetcher

    def __init__(self, config: WorkerConfig, context: dict[Any, Any]) -> None:
        self._config = config
        self._context = context
        self._stack = AsyncExitStack()
        self._hurry = asyncio.Event()

    async def start(self) -> None:
        """Return when jobs are taken; what has been opened is closed if that fails."""
        _warn_of_small_pool(ledger_engine(self._config.session_maker).pool, self._config.max_jobs)
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        logger.info("Takes jobs of the queue %s, %d at a time", self._config.keys.queue, self._config.max_jobs)

    async def stop(self, *, burst: bool = False) -> None:
        """Take nothing more, leave running jobs their grace, and hand back what has not ended by then.

        In a burst what is due in the ledger is run first. A signal ends the burst, and the grace.
        """
        with also_on_signal(self._hurry.set):
            if burst:
                await self._run_what_is_due()
            self.state.board.stopping = True
            self.fetcher.drain()
            logger.info("This worker stops, leaving %d running jobs %g s", len(self.state.running), self._config.grace)
            await self._ended(self._config.grace, hurry=True)
            self.state.running.stop()
            await self._ended(CANCELLED_SECONDS, hurry=False)
            await self.state.running.abandon(ABANDONED_SECONDS)
            await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> None:
        """Each ends before what was opened before it."""
        config, state = self._config, self._share(stack)
        coordinator = Coordinator(config.session_maker, redis=state.redis, namespace=config.keys.namespace)
        coordinator.outage = state.outage
        await stack.enter_async_context(LostAnswers(state.engine))
        await stack.enter_async_context(coordinator)
        await _refuse_autocommit(ledger_engine(config.session_maker))
        self.registry = WorkerRegistry(state)
        self.heartbeat = Heartbeat(state)
        canceller, scheduler, turns = Canceller(state), Scheduler(state), Turns(state)
        for first in (self.heartbeat, Leader(state)):  # no other leads while a loop of this worker still may
            await stack.enter_async_context(first)
        maintenance = (
            self.registry,
            canceller,
            scheduler,
            Reconciler(state, scheduler.start_over),
            Rescuer(state, self.registry, coordinator.publish),
            *([Ticker(state)] if config.periodic else []),
            TurnKeeper(state, turns),
            Pruner(state),
        )
        for loop in maintenance:
            await loop.__aenter__()
        stack.push_async_callback(_end, maintenance)
        coordinator.listen(coordinator.channels.table(inspect(Cancellation), ()), canceller)
        executor = Executor(state, Finalizer(state, scheduler.expect), turns, self._context)
        self.fetcher = await stack.enter_async_context(Fetcher(state, executor, self.registry, turns))

    def _share(self, stack: AsyncExitStack) -> WorkerState:
        config = self._config
        board = stack.enter_context(closing(Board(config.max_jobs)))
        engine, redis = another(ledger_engine(config.session_maker)), config.address.client()
        stack.push_async_callback(dispose, engine)
        stack.push_async_callback(redis.aclose)
        running = RunningJobs(board, config.tasks)
        self.state = WorkerState(config=config, engine=engine, redis=redis, board=board, running=running)
        return self.state

    async def _ended(self, limit: float, *, hurry: bool) -> None:
        """Return when no job runs any more, or the time is up, or somebody is in a hurry."""
        deadline = asyncio.get_running_loop().time() + limit
        while len(self.state.running) and asyncio.get_running_loop().time() < deadline:
            if hurry and self._hurry.is_set():
                return
            await asyncio.sleep(0.02)

    async def _run_what_is_due(self) -> None:
        """Until nothing is due that this worker could run, and nobody else runs: the reconciler hands it over.

        Of a queue that is paused it could run nothing.
        """
        due = jobs.c.scheduled_at <= func.now(), jobs.c.task.in_([*self._config.tasks])
        while not self._hurry.is_set():
            try:
                found = {row.id for row in await QueuedJobs(self.state).ids(*due)}
            except Exception as error:
                if not is_retryable(error):
                    raise
                await asyncio.sleep(BURST_SECONDS)  # the registry says that PostgreSQL is away
                continue
            found -= {job_id for job_id, _ in self.registry.held_elsewhere}
            if (not found or self.state.is_paused) and not len(self.state.running):
                return
            await asyncio.sleep(BURST_SECONDS)


async def _end(loops: Iterable[Loop]) -> None:
    """All at once: each may have to wait for a server that says nothing."""
    await asyncio.gather(*(loop.__aexit__() for loop in loops))


async def _refuse_autocommit(engine: AsyncEngine) -> None:
    """The claim alone would be committed, and a job done before its effect."""
    async with engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).dbapi_connection
        if connection.dialect.detect_autocommit_setting(raw):
            logger.critical("coord cannot use an engine in AUTOCOMMIT mode: jobs would be done before their effect")
            raise SystemExit(1)


def _warn_of_small_pool(pool: Any, max_jobs: int) -> None:
    if isinstance(pool, QueuePool) and 0 < pool.size() < max_jobs:
        logger.warning(
            "The engine's pool keeps %d connections for %d jobs at a time, which will wait for them: pool_size=%d",
            pool.size(),
            max_jobs,
            max_jobs + SPARE_CONNECTIONS,
        )
