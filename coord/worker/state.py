"""What the parts of one worker share: its connections, what runs, and what each has found out for the others."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from sqlalchemy import CursorResult, Executable, Row
from sqlalchemy.ext.asyncio import AsyncEngine

from coord.database.place import ledger_options
from coord.jobs.ids import new_id
from coord.notify.outage import Outage
from coord.queue.handover import push
from coord.queue.keys import QueueKeys
from coord.worker.config import WorkerConfig
from coord.worker.maintenance.beat import Board
from coord.worker.running import RunningJobs

logger = logging.getLogger("arq.coord")

AWAY, BACK = "Redis does not serve this worker, jobs wait", "Redis serves this worker again"
MAX_CONNECTIONS = 4
"""That maintenance uses at a time; a rescue and the heartbeat have one more each."""
CREDIBLE_SECONDS = 5.0
"""Since the last heartbeat, after which others may soon take this worker for dead."""
DRIFT = 0.01
"""Seconds a second by which an answer may be worse than the last one: it may have come to a busy loop."""


class RedisClock:
    """Redis' time, reckoned from its last answer by this process's monotonic clock; before that the process's own."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._error = self._set_at = 0.0
        """By how much it may be wrong, half the round trip, and since when."""
        self.is_set = False

    def set(self, seconds: float, microseconds: float, asked: float) -> None:
        """As TIME has answered; `asked` is when it was, on the monotonic clock."""
        now = time.monotonic()
        error = (now - asked) / 2
        if not self.is_set or error <= self._error + DRIFT * (now - self._set_at):
            self._offset, self._error, self._set_at = seconds + microseconds / 1e6 - (asked + now) / 2, error, now
        self.is_set = True

    def now(self) -> int:
        """Milliseconds since 1970."""
        return round((time.monotonic() + self._offset) * 1000)


@dataclass(slots=True, kw_only=True)
class WorkerState:
    """Of one worker, from its start to its end."""

    config: WorkerConfig
    engine: AsyncEngine
    """Of maintenance: jobs have the application's pool for themselves."""
    redis: Redis
    """Of maintenance: the fetcher's pops block."""
    board: Board
    running: RunningJobs
    id: UUID = field(default_factory=new_id)
    clock: RedisClock = field(default_factory=RedisClock)
    outage: Outage = field(default_factory=lambda: Outage(logger, away=AWAY, back=BACK))
    """Of Redis, as this worker finds it."""
    connections: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CONNECTIONS))
    is_paused: bool | None = None
    """Whether the queue is, as the registry has read; None until it has: nothing of it is taken before that."""
    is_served: bool = True
    """Whether Redis did what the fetcher asked for at last."""
    leads_until: float = 0.0
    """When the leader's lease ends, on the monotonic clock."""

    @property
    def keys(self) -> QueueKeys:
        return self.config.keys

    @property
    def is_leader(self) -> bool:
        return time.monotonic() < self.leads_until

    @property
    def may_take(self) -> bool:
        """Others must know that this worker lives, or they would give away what it takes."""
        return self.is_paused is False and time.monotonic() - self.board.beaten < CREDIBLE_SECONDS

    async def hand_over(
        self, rows: Iterable[Row[Any]], *, keys: QueueKeys | None = None, least: float = -math.inf
    ) -> None:
        """Jobs that are due in their `remaining` seconds, or in the least; of another queue by its keys."""
        command = push(keys or self.keys, [(row, max(float(row.remaining), least)) for row in rows])
        if command is not None:
            await self.redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def execute(self, statement: Executable) -> CursorResult[Any]:
        """Committed; its rows are gone with its connection."""
        async with self.connections, self.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            return await connection.execute(statement, execution_options=await connection.run_sync(ledger_options))

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        """Its rows, and committed if it has written."""
        async with self.connections, self.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            options = await connection.run_sync(ledger_options)
            return (await connection.execute(statement, execution_options=options)).all()
