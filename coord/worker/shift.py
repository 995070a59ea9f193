"""One worker's shift: everything that is open while it runs, and who closes it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.exc import ProgrammingError

from coord.coordinator import Coordinator
from coord.database.engine import engine_of
from coord.jobs.model import new_id
from coord.notify.outage import Outage
from coord.worker.claims import Claims
from coord.worker.keeper import Identity, Keeper
from coord.worker.link import Link
from coord.worker.pickup import Pickup
from coord.worker.rescue import lock_of
from coord.worker.running import UNLIMITED, Limits, Runner
from coord.worker.shutdown import Shutdown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from uuid import UUID

    from arq.cron import CronJob
    from arq.worker import Function
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.notify.channels import Channels
    from coord.worker.address import Address
    from coord.worker.hooks import Hook
    from coord.worker.redis import WorkerRedis

    F = TypeVar("F", Function, CronJob)

logger = logging.getLogger("arq.coord")

UNDEFINED_TABLE = "42P01"

LINGER = 0.2
"""Seconds between two looks whether the last job has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a worker was told, as `worker_settings` has checked it."""

    queue: str
    """Its name in the ledger."""
    key: str
    """Its sorted set in Redis."""
    namespace: str
    slots: int
    limits: Limits
    grace: float
    keep: float
    health_key: str
    on_startup: Hook | None
    on_shutdown: Hook | None
    on_job_start: Hook | None
    handles_signals: bool


class Shift:
    """Begun and ended by arq's own hooks, any number of times, but not twice at once.

    It also ends by itself soon after arq's main task has: arq's `close` gives up when a job was cancelled at its very
    beginning, and a worker in burst mode may be run again without having been closed.
    """

    def __init__(
        self,
        session_maker: async_sessionmaker[AsyncSession],
        redis: WorkerRedis,
        address: Address,
        tries: Mapping[str, int | None],
        terms: Terms,
    ) -> None:
        self._session_maker = session_maker
        self._redis = redis
        self._address = address
        self._terms = terms
        self._tries = tries
        self._runner: Runner | None = None
        self._claims: Claims | None = None
        self._shutdown = Shutdown(grace=terms.grace)
        self._stack = AsyncExitStack()
        self._ending: asyncio.Task[None] | None = None

    def wrapped(self, function: F) -> F:
        """The function as arq is given it: its limits are kept here, and its end is told to the ledger."""

        async def run(ctx: dict[Any, Any], /, *args: Any, **kwargs: Any) -> Any:
            if self._runner is None:
                raise RuntimeError("the worker has not begun its shift")
            return await self._runner.run(function, ctx, args, kwargs)

        coroutine: Any = run  # a task may have an argument of its own that is called ctx
        return replace(function, coroutine=coroutine, timeout_s=UNLIMITED, max_tries=int(UNLIMITED))

    async def begin(self, ctx: dict[Any, Any]) -> None:
        """arq's `on_startup`: first the application's own, which may make the tables."""
        if ctx["redis"] is not self._redis:
            raise SystemExit("arq --watch would go on with another Redis; `watchfiles 'arq module.Settings'` does not")
        await self.end(ctx)
        main = asyncio.current_task()
        assert main is not None
        async with AsyncExitStack() as stack:
            self._shutdown = Shutdown(grace=self._terms.grace)
            if self._terms.handles_signals:
                self._shutdown.handle_signals(main)
                stack.callback(self._shutdown.forget_signals)
            stack.push_async_callback(self._redis.connection_pool.disconnect)
            if self._terms.on_shutdown is not None:
                stack.push_async_callback(self._terms.on_shutdown, ctx)
            if self._terms.on_startup is not None:
                await self._terms.on_startup(ctx)
            await self._open(stack)
            self._stack, self._ending = stack.pop_all(), None
        main.add_done_callback(partial(self._main_has_ended, self._stack))

    async def end(self, ctx: dict[Any, Any]) -> None:
        """arq's `on_shutdown`, when no job runs any more: last the application's own."""
        if self._ending is None:
            self._close()
        assert self._ending is not None
        await asyncio.shield(self._ending)

    def _close(self) -> None:
        self._ending = self._redis.ending = asyncio.create_task(self._stack.aclose(), name="coord shift ends")

    def _main_has_ended(self, stack: AsyncExitStack, _main: asyncio.Task[Any]) -> None:
        loop = asyncio.get_running_loop()
        if stack is not self._stack:
            return  # the next shift has begun
        if self._claims is not None and any(claim.task and not claim.task.done() for claim in self._claims.all()):
            loop.call_later(LINGER, self._main_has_ended, stack, _main)
        elif self._ending is None:
            self._close()

    async def _open(self, stack: AsyncExitStack) -> None:
        terms, worker = self._terms, new_id()
        coordinator = Coordinator(self._session_maker, redis=self._redis, namespace=terms.namespace)
        coordinator.outage = Outage(logger, away="Redis is away, jobs wait", back="Redis is back")
        await stack.enter_async_context(coordinator)
        link = Link(self._redis.connection_pool, coordinator.outage)
        stack.push_async_callback(link.close)
        self._claims = Claims(terms.slots)
        pickup = Pickup(link, self._claims, queue=terms.key, worker=worker)
        runner = Runner(
            self._session_maker, pickup, terms.limits, worker_lock=lock_of(worker), on_job_start=terms.on_job_start
        )
        keeper = self._keeper(self._identity(worker, coordinator.channels), pickup, runner)
        await _enrolled(keeper)
        stack.push_async_callback(keeper.stop)
        pickup.known, pickup.give_up, pickup.is_alive = self._tries, runner.give_up, keeper.is_credible
        coordinator.listen(pickup.bell, pickup)
        coordinator.listen(coordinator.channels.cancellations, _Nudge(keeper))
        stack.push_async_callback(pickup.leave)
        self._redis.pickup, self._runner = pickup, runner
        stack.callback(setattr, self._redis, "pickup", None)
        self._shutdown.pickup = pickup

    def _identity(self, worker: UUID, channels: Channels) -> Identity:
        terms = self._terms
        return Identity(
            id=worker,
            queue=terms.queue,
            key=terms.key,
            health_key=terms.health_key,
            channels=channels,
            attempts=terms.limits.attempts,
            tries={task: tries for task, tries in self._tries.items() if tries},
            keep=terms.keep,
        )

    def _keeper(self, identity: Identity, pickup: Pickup, runner: Runner) -> Keeper:
        loop = asyncio.get_running_loop()
        return Keeper(
            identity,
            engine_of(self._session_maker),
            self._address.pool,
            pickup.claims,
            cancel=lambda job_id: _call(loop, runner.cancel, job_id),
            polled=lambda: pickup.polled,
        )


class _Nudge:
    """Somebody has cancelled a job: perhaps one that runs here."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def listening(self) -> None:
        self._keeper.nudge()

    rung = listening


async def _enrolled(keeper: Keeper) -> None:
    """Somebody else, started together with this worker, may only be making the tables."""
    pause = 0.1
    while True:
        try:
            return await keeper.start()
        except ProgrammingError as error:
            if getattr(error.orig, "sqlstate", None) != UNDEFINED_TABLE:
                raise
        if pause == 0.1:
            logger.warning("The ledger's tables are missing; waiting for them: `coord schema --apply` makes them")
        await asyncio.sleep(pause)
        pause = min(2 * pause, 2.0)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)
