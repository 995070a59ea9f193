"""The settings class that `arq worker.Settings` runs."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import socket
from typing import TYPE_CHECKING, Any

from arq.worker import Function, Worker, func

from coord.database.engine import engine_of
from coord.durations import seconds
from coord.jobs.feed import DEFAULT_QUEUE, NAMESPACE, queue_key
from coord.worker.address import Address
from coord.worker.hooks import uncancelled
from coord.worker.messages import deserialized, serialize
from coord.worker.redis import WorkerRedis
from coord.worker.running import UNLIMITED, Limits
from coord.worker.shift import Shift, Terms

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from arq.connections import RedisSettings
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.durations import Seconds

KEPT = 7 * 86_400
"""Seconds that the ledger keeps jobs that have ended."""
NEVER = 10.0**12
"""Seconds since 1970 that arq will not live to see."""
_FIXED = {
    "health_check_interval": NEVER,  # the keeper writes it
    "handle_signals": False,
    "poll_delay": 0,  # the pick-up waits
    "max_jobs": int(UNLIMITED),  # and counts
    "max_tries": int(UNLIMITED),
    "job_timeout": UNLIMITED,
    "retry_jobs": True,
}


def worker_settings(
    functions: Sequence[Any],
    *,
    session_maker: async_sessionmaker[AsyncSession],
    redis: str | RedisSettings,
    namespace: str = NAMESPACE,
    grace: Seconds = 20,
    idle_limit: Seconds = 8,
    keep: Seconds = KEPT,
    **arq_settings: Any,
) -> type:
    """A settings class for arq's worker, which runs jobs of the ledger as this library promises.

    `functions` are coroutines, or what arq's `func` makes of them. `grace`: seconds that running jobs have after
    SIGTERM; afterwards they are handed back, which uses up no attempt. `idle_limit`: seconds that a `job_transaction`
    may do nothing before PostgreSQL ends it. `keep`: seconds that the ledger keeps jobs that have ended. `namespace` is
    that of the `Coordinator`s. The rest are arq's own: `max_jobs` (10), `job_timeout` (seconds, 300), `max_tries`
    (attempts of a job that says nothing else, 10), `queue_name` (as in `task_options`), `on_startup`, `cron_jobs` …

        Settings = worker_settings([fulfil_order], session_maker=session_maker, redis="redis://localhost:6379/0")

    Connects to nothing. Run by `arq module.Settings`, it needs the ledger's tables (`coord schema`), outlives any
    absence of Redis, and runs on uvloop if that is installed. Beside its pool it opens two connections to PostgreSQL
    and six to Redis at most. Raises `ValueError` or `TypeError` here for what makes no sense.
    """
    engine_of(session_maker)
    address = Address(redis)
    options: dict[str, Any] = {
        "max_jobs": 10,
        "job_timeout": 300,
        "max_tries": 10,
        "queue_name": DEFAULT_QUEUE,
    } | arq_settings
    _check(options)
    key = queue_key(namespace, options["queue_name"])
    pool = _pool(address, key, options)
    own: dict[str, Any] = {"namespace": namespace, "grace": grace, "idle_limit": idle_limit, "keep": keep}
    tasks = [func(function) for function in functions]
    tries = {task.name: task.max_tries for task in tasks}
    shift = Shift(session_maker, pool, address, tries, _terms(key, pool.health_check_key, options, **own))
    ours = {
        "functions": _Functions(map(shift.wrapped, tasks)),
        "cron_jobs": [shift.wrapped(job) for job in options.get("cron_jobs") or ()],
        "redis_pool": pool,
        "redis_settings": address.settings(),
        "queue_name": key,
        "health_check_key": pool.health_check_key,
        "job_serializer": pool.job_serializer,
        "job_deserializer": pool.job_deserializer,
        "on_startup": shift.begin,
        "on_shutdown": shift.end,
        "on_job_start": None,  # called where it cannot end the worker
        "on_job_end": uncancelled(options.get("on_job_end")),
        "after_job_end": uncancelled(options.get("after_job_end")),
        "keep_result": options.get("keep_result", 0),
    }
    return type("Settings", (), {"__doc__": "Made by coord's worker_settings.", **options, **_FIXED, **ours})


def _pool(address: Address, key: str, options: dict[str, Any]) -> WorkerRedis:
    pool = WorkerRedis(address.pool(), default_queue_name=key)
    pool.health_check_key = options.get("health_check_key") or f"{key}:health-check:{socket.gethostname()}"
    pool.job_serializer = options.get("job_serializer") or serialize
    pool.job_deserializer = deserialized(options.get("job_deserializer") or json.loads)
    pool.expires_extra_ms = options.get("expires_extra_ms", pool.expires_extra_ms)
    return pool


def _terms(
    key: str,
    health_key: str,
    options: dict[str, Any],
    *,
    namespace: str,
    grace: Seconds,
    idle_limit: Seconds,
    keep: Seconds,
) -> Terms:
    return Terms(
        queue=options["queue_name"],
        key=key,
        namespace=namespace,
        slots=options["max_jobs"],
        limits=Limits(
            attempts=options["max_tries"],
            timeout=_positive("job_timeout", options["job_timeout"]),
            idle=_positive("idle_limit", idle_limit),
        ),
        grace=seconds("grace", grace),
        keep=seconds("keep", keep),
        health_key=health_key,
        on_startup=options.get("on_startup"),
        on_shutdown=options.get("on_shutdown"),
        on_job_start=options.get("on_job_start"),
        handles_signals=options.get("handle_signals", True),
    )


class _Functions(tuple[Function, ...]):
    """The functions. Reading them is the first thing a worker does, before it takes an event loop: time for uvloop."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Function]:
        if importlib.util.find_spec("uvloop") is not None and not _has_loop():
            asyncio.set_event_loop(importlib.import_module("uvloop").new_event_loop())
        return super().__iter__()


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _check(options: dict[str, Any]) -> None:
    unknown = options.keys() - inspect.signature(Worker).parameters.keys()
    if unknown:
        raise TypeError(f"arq's worker has no setting {', '.join(sorted(unknown))}")
    for name in ("max_jobs", "max_tries"):
        if not isinstance(options[name], int) or isinstance(options[name], bool) or options[name] < 1:
            raise ValueError(f"{name} is a whole number, 1 or more, not {options[name]!r}")
    if not isinstance(options["queue_name"], str) or not options["queue_name"]:
        raise ValueError(f"queue_name is a text, not {options['queue_name']!r}")


def _positive(name: str, value: object) -> float:
    number = seconds(name, value)
    if number == 0:
        raise ValueError(f"{name} is more than 0 seconds")
    return number
