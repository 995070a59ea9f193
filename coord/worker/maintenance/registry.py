"""Who is alive: told by the heartbeats this worker has itself seen move, and by no clock but its own.

A worker is taken for dead when its heartbeat has stood still while it was watched. A pause in the watching, say while
PostgreSQL was away, begins it anew: nobody is dead because the watcher could not look.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import select

from coord.jobs.model import queues, workers
from coord.notify.outage import Outage
from coord.worker.maintenance.loops import Loop
from coord.worker.state import WorkerState

logger = logging.getLogger("arq.coord")

DEAD_SECONDS = 6.0
"""Without a heartbeat: two are missing, and then some."""
BLINK_SECONDS = 3.0
"""Between two looks, after which nothing can be said of the time between."""


@dataclass(slots=True)
class Seen:
    beats: int
    since: float
    """When this heartbeat was first seen."""
    jobs: Mapping[str, Any]
    died: bool = False
    """Whether its heartbeat has seen it die."""


class WorkerRegistry(Loop):
    """The workers of one queue, and whether the queue is paused."""

    interval = 0.5

    def __init__(self, state: WorkerState) -> None:
        super().__init__(state)
        self._looked = float("-inf")
        self._outage = Outage(
            logger, away="PostgreSQL is away, jobs cannot be looked after", back="PostgreSQL answers again"
        )
        self.seen: dict[UUID, Seen] = {}
        self.dead: dict[UUID, Seen] = {}

    @property
    def held_elsewhere(self) -> set[tuple[UUID, int]]:
        """The jobs, and their attempts, that other workers taken for living say they run."""
        return self.held_beside(self._state.id)

    def held_beside(self, worker: UUID) -> set[tuple[UUID, int]]:
        """As `held_elsewhere`, seen from that worker."""
        others = (seen for id_, seen in self.seen.items() if id_ != worker and id_ not in self.dead)
        return {key for seen in others for key in named(seen.jobs)}

    async def round(self) -> None:
        now = time.monotonic()
        statement = select(queues.c.paused_at, workers.c.id, workers.c.beats, workers.c.jobs, workers.c.dead)
        both = queues.outerjoin(workers, workers.c.queue == queues.c.name)
        rows = await self._state.read(statement.select_from(both).where(queues.c.name == self._state.keys.queue))
        self._outage.report(None)
        self._note(now, [row for row in rows if row.id is not None])
        is_paused = any(row.paused_at is not None for row in rows)
        if is_paused is not self._state.is_paused:
            self._state.is_paused = is_paused
            self._state.running.changed.set()

    def failed(self, error: Exception) -> None:
        self._outage.report(error)

    def _note(self, now: float, rows: Sequence[Any]) -> None:
        watched = now - self._looked <= BLINK_SECONDS
        seen = {}
        for row in rows:
            last = self.seen.get(row.id)
            since = last.since if watched and last is not None and last.beats == row.beats else now
            seen[row.id] = Seen(row.beats, since, row.jobs, row.dead)
        self._looked, self.seen = now, seen
        others = [(id_, worker) for id_, worker in seen.items() if id_ != self._state.id]
        self.dead = {id_: worker for id_, worker in others if worker.died or now - worker.since > DEAD_SECONDS}


def named(jobs: Mapping[str, Any]) -> set[tuple[UUID, int]]:
    """What a heartbeat says is run."""
    return {(UUID(job), told["attempt"]) for job, told in jobs.items()}
