"""The settings class that `arq worker.Settings` runs."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from arq.connections import RedisSettings
from arq.worker import Function, Worker, func
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord.cancellation import times_cancelled
from coord.database.engine import another, dispose
from coord.durations import MAX_SECONDS, Seconds, positive, seconds, whole
from coord.jobs.model import ledger_engine
from coord.jobs.options import DEFAULT_QUEUE, checked_text
from coord.jobs.periodic import Periodic
from coord.notify.outage import Outage
from coord.queue.keys import NAMESPACE, QueueKeys
from coord.worker.address import Address
from coord.worker.config import Hook, WorkerConfig
from coord.worker.lifecycle import Lifecycle
from coord.worker.patience import Patience
from coord.worker.stopping import guard_forks

logger = logging.getLogger("arq.coord")

KEEP_SECONDS = 7 * 86_400
"""That the ledger keeps jobs that have ended."""
NEVER_SECONDS = 10.0**12
"""Since 1970, that arq will not live to see: it writes no health key."""
REFUSED = {
    "redis_settings": "redis= says where Redis is",
    "redis_pool": "redis= says where Redis is",
    "health_check_interval": "the heartbeat writes the key, every two seconds",
    "max_burst_jobs": "a burst runs whatever is due in the ledger",
}
POSTGRESQL_SECONDS = 2.0
"""For PostgreSQL to accept a connection."""
DEFAULTS = {"max_jobs": 10, "job_timeout": 300, "max_tries": 10}
"""For jobs of the ledger; arq's own have arq's."""
HOOKS = ("on_job_start", "on_job_end", "after_job_end")


def worker_settings(
    functions: Sequence[Any],
    *,
    session_maker: async_sessionmaker[AsyncSession],
    redis: str | RedisSettings,
    queue: str = DEFAULT_QUEUE,
    namespace: str = NAMESPACE,
    grace: Seconds = 20,
    idle_limit: Seconds = 60,
    keep: Seconds = KEEP_SECONDS,
    unknown_after: Seconds | None = None,
    periodic: Sequence[Periodic] = (),
    **arq_settings: Any,
) -> type:
    """A settings class for arq's worker, which runs jobs of the ledger as this library promises, and arq's own as ever.

    `functions` are coroutines, or what arq's `func` makes of them. `queue` is the ledger's, as in `task_options`.
    `grace`: seconds that running jobs have after SIGTERM; afterwards they are handed back, which uses up no attempt.
    `idle_limit`: seconds that a `job_transaction` may do nothing before PostgreSQL ends it. `keep`: seconds that the
    ledger keeps jobs that have ended. `namespace` is that of the `Coordinator`s. `unknown_after`: seconds that a job
    whose task no worker knows is put off for before it fails; unless given it waits as long as it takes. `periodic`:
    schedules, which end when no worker has them in its settings any more. The rest are arq's: `max_jobs` (10),
    `job_timeout` (seconds, 300), `max_tries` (attempts of a job that says nothing else, 10), `on_startup`, `cron_jobs`,
    `queue_name` of arq's own jobs … `docs/jobs.md` has a table of them.

        Settings = worker_settings([fulfil_order], session_maker=session_maker, redis="redis://localhost:6379/0")

    Connects to nothing. Run by `arq module.Settings`, it needs the ledger's tables (`coord schema`) and outlives any
    absence of Redis. Beside its pool it opens up to six connections to PostgreSQL, two more while answers are
    late, and about a dozen to Redis.
    Raises `ValueError` or `TypeError` here for what makes no sense.
    """
    ledger_engine(session_maker)
    if isinstance(functions, str) or not isinstance(functions, Iterable):
        raise TypeError(f"functions is a list of tasks, [fulfil_order] say, not {functions!r}")
    _check(arq_settings)
    keys = QueueKeys(checked_text("namespace", namespace), checked_text("queue", queue))
    tasks = _by_name([func(function) for function in functions])
    address, patience = Address(redis), Patience()
    hooks = {name: _guarded(arq_settings.get(name)) for name in HOOKS}
    configure = partial(
        WorkerConfig,
        session_maker=session_maker,
        address=address,
        keys=keys,
        tasks=tasks,
        grace=seconds("grace", grace),
        idle_limit=_idle_limit(idle_limit),
        keep=seconds("keep", keep),
        unknown_after=None if unknown_after is None else seconds("unknown_after", unknown_after),
        hooks=hooks,
        periodic=_scheduled(periodic, tasks, queue),
    )
    settings: dict[str, Any] = {
        "__doc__": "Made by coord's worker_settings.",
        "queue_name": f"arq:queue:{namespace}:{queue}",
        "health_check_key": keys.health(socket.gethostname()),
        **arq_settings,
        **hooks,
        "functions": [*tasks.values()],
        "redis_settings": address.settings(patience),
        "health_check_interval": NEVER_SECONDS,
    }
    made = type("Settings", (), settings)
    host = _Host(lambda: _config(made, configure), arq_settings, patience)
    made.on_startup, made.on_shutdown = host.on_startup, host.on_shutdown  # type: ignore[attr-defined]
    made.worker_config = host.config  # type: ignore[attr-defined]
    host.config()
    return made


class _Host:
    """What arq calls of a settings class, which any number of workers may share, one after another or at once."""

    def __init__(self, config: Callable[[], WorkerConfig], given: Mapping[str, Any], patience: Patience) -> None:
        self.config = config
        self._given = given
        self._patience = patience
        patience.meanwhile = self.report_postgresql
        self._outage = Outage(logger, away="PostgreSQL is away as well", back="PostgreSQL answers")

    async def report_postgresql(self) -> None:
        """While Redis is waited for: the application's `on_startup`, which will want PostgreSQL, is not called yet."""
        engine = another(ledger_engine(self.config().session_maker))
        try:
            async with asyncio.timeout(POSTGRESQL_SECONDS), engine.connect():
                self._outage.report(None)
        except Exception as error:  # noqa: BLE001 - it is only reported
            self._outage.report(error)
        finally:
            await dispose(engine)

    async def on_startup(self, ctx: dict[Any, Any]) -> None:
        """First the application's own, which may make the tables."""
        main = asyncio.current_task()
        assert main is not None
        self._patience.has_started = True
        self._patience.closing = lambda: self.on_shutdown(ctx)
        guard_forks()
        if "coord.stopping" in ctx:  # of a worker that ran before, and was not closed
            await ctx.pop("coord.stopping")
        if (hook := self._given.get("on_startup")) is not None:
            await hook(ctx)
        await self._patience.takes_over(ctx["redis"])
        await _refuse_cluster(ctx["redis"])
        lifecycle = Lifecycle(self.config(), ctx)
        await lifecycle.start()
        ctx["coord.lifecycle"] = lifecycle
        main.add_done_callback(lambda ended: _begin_stopping(ctx, lifecycle, ended))

    async def on_shutdown(self, ctx: dict[Any, Any]) -> None:
        """Wait for what began to stop with arq's main task; then the application's own.

        Which may dispose of its engine: without a limit, so there is nothing left to wait for.
        """
        engine = ledger_engine(self.config().session_maker)
        try:
            if "coord.stopping" in ctx:
                await asyncio.shield(ctx.pop("coord.stopping"))
        finally:
            try:
                await dispose(engine)
            finally:
                if (hook := self._given.get("on_shutdown")) is not None:
                    await hook(ctx)
                await dispose(engine)


def _begin_stopping(ctx: dict[Any, Any], lifecycle: Lifecycle, main: asyncio.Task[Any]) -> None:
    """arq asks Redis before it calls `on_shutdown`, and waits for it. A main task that just ends was a burst."""
    burst = not main.cancelled() and main.exception() is None
    ctx["coord.stopping"] = asyncio.create_task(lifecycle.stop(burst=burst), name="coord worker stops")


async def _refuse_cluster(redis: Any) -> None:
    if (await redis.info("cluster")).get("cluster_enabled"):
        logger.critical("coord cannot use a Redis Cluster, for which arq has no settings: give it a server of its own")
        raise SystemExit(1)


def _config(made: Any, configure: Callable[..., WorkerConfig]) -> WorkerConfig:
    """As the class says now: its attributes may have been set since it was made."""
    options = {name: getattr(made, name, default) for name, default in DEFAULTS.items()}
    return configure(
        max_jobs=whole("max_jobs", options["max_jobs"]),
        max_attempts=whole("max_tries", options["max_tries"]),
        job_timeout=positive("job_timeout", options["job_timeout"]),
        health_check_key=made.health_check_key,
    )


def _guarded(hook: Hook | None) -> Hook:
    """A hook of the application's around jobs, arq's own included: one that fails must not end the worker."""

    async def run(ctx: dict[Any, Any]) -> None:
        before = times_cancelled()  # its job may have been
        try:
            if hook is not None:
                await hook(ctx)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and times_cancelled() > before:
                raise
            logger.exception("%s has failed", getattr(hook, "__qualname__", hook))

    return run


def _by_name(tasks: Sequence[Function]) -> dict[str, Function]:
    found: dict[str, Function] = {}
    for task in tasks:
        if task.name in found and found[task.name].coroutine is not task.coroutine:
            raise ValueError(f"two tasks are called {task.name}: give one of them another name with arq's func")
        found[task.name] = task
    return found


def _scheduled(periodic: Sequence[Periodic], tasks: Mapping[str, Function], queue: str) -> tuple[Periodic, ...]:
    names = set()
    for each in periodic:
        if not isinstance(each, Periodic):
            raise TypeError(f"schedules are made by periodic(task, cron), and {each!r} was not")
        if each.call.options.queue in (None, queue) and each.call.options.name not in tasks:
            raise ValueError(f"{each.call.options.name} is periodic, and not among the functions")
        if (name := each.name(queue)) in names:
            raise ValueError(f"two schedules are the same: {name}")
        names.add(name)
    return tuple(periodic)


def _idle_limit(value: Seconds) -> float:
    """As PostgreSQL can keep it: in whole milliseconds, of which none would be no limit."""
    limit = positive("idle_limit", value)
    if not 0.001 <= limit <= MAX_SECONDS:
        raise ValueError(f"idle_limit is 0.001 to {MAX_SECONDS:.0f} seconds, not {value!r}")
    return limit


def _check(options: Mapping[str, Any]) -> None:
    unknown = options.keys() - inspect.signature(Worker).parameters.keys()
    if unknown:
        raise TypeError(f"arq's worker has no setting {', '.join(sorted(unknown))}")
    for name, reason in REFUSED.items():
        if name in options:
            raise TypeError(f"worker_settings does not take {name}: {reason}")
