"""What is measured: pick-ups, idle cost and memory, by a process that enqueues as an API does."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from benchmarks.backlog.stage import opened_sessions, urgent
from benchmarks.cpu import postgresql_seconds, process_seconds
from benchmarks.waiting.process import resident_bytes
from coord import Coordinator, enqueue, task_options

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from benchmarks.backlog.stage import Scale
    from benchmarks.servers import Servers

    Sessions = async_sessionmaker[AsyncSession]

TOP = 100
"""The highest priority."""
PAUSE_SECONDS = 0.05
"""Between two jobs of the highest priority."""
SCRIPTS_SECONDS = 2.0
"""Between two jobs that nobody hands over."""
FILL = text("""
    INSERT INTO coord_jobs (id, task, queue, arguments, scheduled_at)
    SELECT uuidv7(), 'drain', 'default', '[[],{}]', now() + :after * interval '1 s' + n * :step * interval '1 s'
    FROM generate_series(1, :jobs) AS n
""")
LEFT = text("""
    SELECT count(*) FROM (SELECT 1 FROM coord_jobs WHERE state = 'queued' AND queue = 'default' AND task = 'drain'
    AND scheduled_at <= now() + interval '1 hour' LIMIT 1) AS one
""")
STARTED = text("SELECT id, result FROM coord_jobs WHERE task = 'urgent' AND state = 'done'")


@dataclass(frozen=True, slots=True)
class Idle:
    """Shares of a core."""

    worker: float
    """With its heartbeat."""
    postgresql: float


@dataclass(slots=True)
class Found:
    empty: Idle
    """With an empty ledger."""
    idle: Idle
    """With nothing due."""
    unheard: list[float]
    """Seconds to the pick-up of jobs that nobody handed over, with nothing due."""
    memory: dict[str, list[int]]
    """Bytes of each process: before, and then once a second."""
    pick_ups: list[float] = field(default_factory=list)
    unheard_meanwhile: list[float] = field(default_factory=list)
    """The same, while the others drain."""
    seconds: float = 0.0
    drained: bool = False


class Api:
    """What enqueues and looks on, beside a worker in a process of its own."""

    def __init__(self, servers: Servers, scale: Scale, worker: int, sessions: Sessions, script: Sessions) -> None:
        self._servers = servers
        self._scale = scale
        self._worker = worker
        self._sessions = sessions
        self._script = script
        """Of an engine that has no coordinator."""
        self._committed: dict[Any, float] = {}

    async def measure(self) -> Found:
        await self._fill(self._scale.warm, 0.0, 0.0)
        await self._drained(time.monotonic() + self._scale.drain_seconds)
        await self._pick_ups(self._sessions, self._scale.warm // 20, 0.0)
        empty = await self._idle()
        memory = {"worker": [resident_bytes(self._worker)], "API": [resident_bytes()]}
        await self._fill(self._scale.later, 2 * 86_400.0, 1.0)
        idle = await self._idle()
        unheard = await self._pick_ups(self._script, self._scale.scripts, SCRIPTS_SECONDS)
        found = Found(empty, idle, unheard, memory)
        await self._fill(self._scale.due, self._scale.ahead, 0.0)
        await asyncio.sleep(self._scale.ahead)
        await self._drain(found)
        await asyncio.sleep(SCRIPTS_SECONDS)
        self._note(memory)
        return found

    async def _fill(self, jobs: int, after: float, step: float) -> None:
        async with self._sessions.begin() as session:
            await session.execute(FILL, {"jobs": jobs, "after": after, "step": step})
        async with self._sessions.begin() as session:
            await session.execute(text("ANALYZE coord_jobs"))

    async def _drain(self, found: Found) -> None:
        began = time.monotonic()
        drained = asyncio.create_task(self._drained(began + self._scale.drain_seconds))
        own, unheard = [], []
        while not drained.done():
            own.append(await self._enqueued(self._sessions))
            if len(own) % round(SCRIPTS_SECONDS / PAUSE_SECONDS) == 1:
                unheard.append(await self._enqueued(self._script))
            self._note(found.memory)
            await asyncio.sleep(PAUSE_SECONDS)
        found.drained, found.seconds = await drained, time.monotonic() - began
        found.pick_ups, found.unheard_meanwhile = await self._waited(own), await self._waited(unheard)

    async def _drained(self, deadline: float) -> bool:
        """Whether all that was due has run by then."""
        while time.monotonic() < deadline:
            async with self._sessions() as session:
                if not await session.scalar(LEFT):
                    return True
            await asyncio.sleep(0.2)
        return False

    async def _pick_ups(self, sessions: Sessions, jobs: int, pause: float) -> list[float]:
        """Of so many jobs, one after the other, with a pause in seconds between them."""
        enqueued = []
        for _ in range(jobs):
            enqueued.append(await self._enqueued(sessions))
            await asyncio.sleep(pause)
        return await self._waited(enqueued)

    async def _enqueued(self, sessions: Sessions) -> Any:
        async with sessions() as session:
            job = await enqueue(session, task_options(urgent, priority=TOP))
            await session.commit()
        self._committed[job.id] = time.monotonic()
        return job.id

    async def _waited(self, jobs: list[Any]) -> list[float]:
        """Seconds from the commit of each to when it was begun; those that are not begun in time fail the run."""
        async with asyncio.timeout(60):
            while True:
                async with self._sessions() as session:
                    started = {row.id: float(row.result) for row in await session.execute(STARTED) if row.result}
                if started.keys() >= set(jobs):
                    return [max(started[job] - self._committed[job], 0.0) for job in jobs]
                await asyncio.sleep(0.2)

    async def _idle(self) -> Idle:
        await asyncio.sleep(6)  # until what was done just now has settled: pages to vacuum, pops that count for a while
        began, before = time.monotonic(), self._spent()
        await asyncio.sleep(self._scale.idle_seconds)
        took = time.monotonic() - began
        return Idle(*((now - then) / took for now, then in zip(self._spent(), before, strict=True)))

    def _spent(self) -> tuple[float, float]:
        heartbeat = Path(f"/proc/{self._worker}/task/{self._worker}/children").read_text().split()
        worker = sum(process_seconds(pid) for pid in (self._worker, *map(int, heartbeat)))
        return worker, postgresql_seconds(self._servers.postgresql_pid)

    def _note(self, memory: dict[str, list[int]]) -> None:
        memory["worker"].append(resident_bytes(self._worker))
        memory["API"].append(resident_bytes())


async def measure(servers: Servers, scale: Scale, worker: int) -> Found:
    logging.getLogger("coord").setLevel(logging.ERROR)  # that one engine has no coordinator is the point
    url = servers.database_url
    async with (
        opened_sessions(url) as sessions,
        opened_sessions(url) as script,
        Coordinator(sessions, redis=servers.redis_url),
    ):
        return await Api(servers, scale, worker, sessions, script).measure()
