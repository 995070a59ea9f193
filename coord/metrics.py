"""Metrics for Prometheus, in any process that waits, enqueues or works: `pip install "coord[metrics]"`.

    metrics = Metrics()                                              # once in a process
    app.include_router(metrics.routes(session_maker))                # GET /metrics
    metrics.serve(9400)                                              # of a worker: a port of its own ...
    async with metrics.written(Path("/var/lib/node/coord.prom")):    # ... or a file for node_exporter
        ...

With `PROMETHEUS_MULTIPROC_DIR` set before the processes start, whichever of a server's processes is scraped answers for
all of them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import event, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from coord.errors import message_of
from coord.jobs.model import JobState, execute, is_queued, jobs
from coord.jobs.queries import heartbeats, held_by
from coord.observation import PUT_OFF, Observer, observers
from coord.timings import AttemptTimings

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        REGISTRY,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
        multiprocess,
        start_http_server,
        write_to_textfile,
    )
    from prometheus_client.core import GaugeMetricFamily
except ModuleNotFoundError as error:
    raise ImportError('metrics need prometheus_client: pip install "coord[metrics]"') from error

logger = logging.getLogger("coord.metrics")

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
"""Seconds: from a lock that is free to a job that waits for a deployment."""
LEDGER_SECONDS = 5.0
"""For which one look into the ledger serves all scrapes of this process."""
WRITE_SECONDS = 10.0
"""Between two writes of the file."""
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"


class Metrics(Observer):
    """Counts from now on what happens in this process. One a registry; a second is prometheus-client's `ValueError`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._ledger = _Ledger()
        of: dict[str, Any] = {"registry": registry}
        timed: dict[str, Any] = {**of, "buckets": BUCKETS}
        live: dict[str, Any] = {**of, "multiprocess_mode": "livesum"}
        self._finished = Counter("coord_jobs_finished", "Attempts by how they ended", ["task", "outcome"], **of)
        self._queue = Histogram("coord_job_queue_seconds", "From when a job was due until its attempt began", **timed)
        self._run = Histogram("coord_job_run_seconds", "From there until its commit, locks included", **timed)
        self._lock = Histogram("coord_lock_wait_seconds", "Until a lock was granted or not", ["table", "mode"], **timed)
        self._wait = Histogram("coord_wait_seconds", "Waits by how they ended", ["outcome"], **timed)
        self._waiters = Gauge("coord_waiters", "Waits and event streams of this process", **live)
        self._hints = Counter("coord_hints", "Messages of the bell: published, heard, missed", ["kind"], **of)
        self._rescues = Counter("coord_rescues", "Jobs taken from workers that died", **of)
        self._pool = Gauge("coord_pool_connections", "Connections of the pool: used, size", ["state"], **live)
        observers.append(self)
        if os.environ.get(MULTIPROCESS):
            atexit.register(multiprocess.mark_process_dead, os.getpid())

    def close(self) -> None:
        """Count nothing more."""
        observers.remove(self)

    def watch(self, engine: AsyncEngine) -> None:
        """Count the connections that the engine's pool has, and those that are in use."""
        used, size = self._pool.labels("used"), self._pool.labels("size")
        pool = engine.sync_engine.pool
        event.listen(pool, "connect", lambda *_: size.inc())
        event.listen(pool, "close", lambda *_: size.dec())
        event.listen(pool, "checkout", lambda *_: used.inc())
        event.listen(pool, "checkin", lambda *_: used.dec())

    def lock_waited(self, tables: Sequence[str], mode: str, seconds: float) -> None:
        self._lock.labels(",".join(tables), mode).observe(seconds)

    def waiters(self, change: int) -> None:
        self._waiters.inc(change)

    def wait_ended(self, outcome: str, seconds: float) -> None:
        self._wait.labels(outcome).observe(seconds)

    def hints(self, kind: str, count: int = 1) -> None:
        self._hints.labels(kind).inc(count)

    def attempt_ended(self, task: str, outcome: str, timings: AttemptTimings) -> None:
        self._finished.labels(task, outcome).inc()
        if outcome == PUT_OFF:
            return
        self._queue.observe(timings.queue)
        self._run.observe(timings.lock + timings.task)

    def rescued(self, jobs: int) -> None:
        self._rescues.inc(jobs)

    def text(self) -> bytes:
        """What a scrape answers, of all processes that share `PROMETHEUS_MULTIPROC_DIR`, without the ledger's."""
        return generate_latest(self._served())

    def routes(self, session_maker: async_sessionmaker[AsyncSession], *, path: str = "/metrics") -> APIRouter:
        """`GET /metrics`, with the ledger's figures, for which it opens a session of its own; not for everybody."""
        router = APIRouter(tags=["metrics"], include_in_schema=False)

        @router.get(path)
        async def metrics() -> Any:
            await self._ledger.read(session_maker)
            return Response(self.text() + generate_latest(self._ledger), media_type=CONTENT_TYPE_LATEST)

        return router

    def serve(self, port: int, *, host: str = "127.0.0.1") -> None:
        """On a port of its own, by a thread that ends with the process, without the ledger's figures."""
        start_http_server(port, addr=host, registry=self._served())

    def _served(self) -> CollectorRegistry:
        if not os.environ.get(MULTIPROCESS):
            return self._registry
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry

    @contextlib.asynccontextmanager
    async def written(self, path: Path, *, interval: float = WRITE_SECONDS) -> AsyncIterator[None]:
        """Write the file every so many seconds until the block ends, whole each time, for a textfile collector."""
        task = asyncio.create_task(self._write_on(path, interval), name="coord metrics")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            write_to_textfile(str(path), self._served())

    async def _write_on(self, path: Path, interval: float) -> None:
        while True:
            try:
                write_to_textfile(str(path), self._served())
            except OSError as error:
                logger.error("The metrics cannot be written to %s: %s", path, error)
            await asyncio.sleep(interval)


class _Ledger:
    """What PostgreSQL has of unfinished and failed jobs: those that are done are counted as they end."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._expires = 0.0
        self._counts: list[tuple[tuple[str, str, str], int]] = []
        self._oldest: list[tuple[str, float]] = []

    async def read(self, session_maker: async_sessionmaker[AsyncSession]) -> None:
        """If PostgreSQL cannot be asked, a scrape has no figures of the ledger, and the others all the same."""
        async with self._lock:
            if time.monotonic() < self._expires:
                return
            self._counts, self._oldest = [], []
            try:
                async with asyncio.timeout(LEDGER_SECONDS), session_maker() as session:
                    await self._look(session)
            except Exception as error:  # noqa: BLE001 - it is away, or busy
                logger.warning("The ledger cannot be read for a scrape: %s", message_of(error))
            self._expires = time.monotonic() + LEDGER_SECONDS

    async def _look(self, session: AsyncSession) -> None:
        held = held_by(await heartbeats(session))
        for state, condition in (
            (JobState.RUNNING, is_queued & held),
            (JobState.QUEUED, is_queued & ~held),
            (JobState.FAILED, jobs.c.state == literal_column("'failed'")),
        ):
            kinds = (
                select(jobs.c.queue, jobs.c.task, func.count().label("number"))
                .where(condition)
                .group_by(jobs.c.queue, jobs.c.task)
            )
            for row in await session.run_sync(execute, kinds):
                self._counts.append(((row.queue, row.task, str(state)), row.number))
        age = func.extract("epoch", func.clock_timestamp() - func.min(jobs.c.scheduled_at))
        due = is_queued & ~held & (jobs.c.scheduled_at <= func.clock_timestamp())
        oldest = select(jobs.c.queue, age.label("age")).where(due).group_by(jobs.c.queue)
        self._oldest = [(row.queue, float(row.age)) for row in await session.run_sync(execute, oldest)]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        counts = GaugeMetricFamily("coord_jobs", "Unfinished and failed jobs", labels=["queue", "task", "state"])
        for labels, count in self._counts:
            counts.add_metric(labels, count)
        oldest = GaugeMetricFamily(
            "coord_queue_oldest_seconds", "Since the oldest job was due that nobody runs", labels=["queue"]
        )
        for queue, seconds in self._oldest:
            oldest.add_metric([queue], seconds)
        return [counts, oldest]
