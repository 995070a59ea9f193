"""Whether what was popped may still be begun: by the time that has passed, and of what is old by the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, select, tuple_

from coord.jobs.model import is_queued, jobs
from coord.queue.message import Message
from coord.worker.maintenance.registry import WorkerRegistry
from coord.worker.state import WorkerState

LATE_SECONDS = 0.75
"""After which a popped job is not begun: it was on nobody's list meanwhile, and is handed over to another."""
OLD_SECONDS = 10.0
"""After which the ledger is asked whether a message still holds."""
AHEAD_SECONDS = 1.0
"""By which Redis' time may seem to be ahead in a message, or else the ledger is asked: Redis' clock has been set."""
TICK_SECONDS = 0.25


class Freshness:
    def __init__(self, state: WorkerState, registry: WorkerRegistry) -> None:
        self._state = state
        self._registry = registry
        self._ticked = self._stalled = 0.0
        """When the loop was last seen to go on, and to go on after a stall, on its clock."""

    def tick(self) -> None:
        """To be called every `TICK_SECONDS` by the event loop."""
        now = asyncio.get_running_loop().time()
        if self._ticked and now - self._ticked > TICK_SECONDS + LATE_SECONDS:
            self._stalled = now
        self._ticked = now

    def is_late(self, asked: float, *, waited: float) -> bool:
        """Of what was asked for then, and may have been waited for so long in Redis."""
        now = asyncio.get_running_loop().time()
        stalled = self._stalled >= asked or now - max(self._ticked, asked) > TICK_SECONDS + LATE_SECONDS
        return stalled or now - asked > waited + LATE_SECONDS

    def is_old(self, due: float) -> bool:
        """Of a message that was due then, in milliseconds by Redis' clock."""
        clock = self._state.clock
        # Also of what is no number.
        return not clock.is_set or not -AHEAD_SECONDS * 1000 <= clock.now() - due <= OLD_SECONDS * 1000

    async def stale(self, messages: Sequence[Message]) -> set[tuple[UUID, int]]:
        """Those that the ledger does not want to be run, or not yet, or that another worker runs."""
        keys = [message.key for message in messages]
        key = tuple_(jobs.c.id, jobs.c.attempt)
        due = jobs.c.scheduled_at <= func.clock_timestamp()
        rows = await self._state.read(select(jobs.c.id, jobs.c.attempt).where(is_queued, due, key.in_(keys)))
        return set(keys) - ({(row.id, row.attempt) for row in rows} - self._registry.held_elsewhere)
