"""Who is alive: told by the heartbeats this worker has itself seen move, and by no clock but its own.

A worker is taken for dead when its heartbeat has stood still while it was watched. A pause in the watching, say while
PostgreSQL was away, begins it anew: nobody is dead because the watcher could not look.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from coord.jobs.model import workers

if TYPE_CHECKING:
    from uuid import UUID

    from coord.worker.keeper import Identity

DEAD = 6.0
"""Seconds without a heartbeat: two are missing, and then some."""
BLINK = 3.0
"""Seconds between two looks after which nothing can be said of the time between."""
NEVER = float("-inf")


@dataclass(slots=True)
class Seen:
    """A worker as it was last seen."""

    beats: int
    since: float
    """When this heartbeat was first seen."""
    after: float
    """When it had certainly not been written yet."""
    jobs: dict[str, Any]


class Census:
    """The workers of one queue."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._looked = NEVER
        self.seen: dict[UUID, Seen] = {}
        self.dead: dict[UUID, Seen] = {}

    async def take(self, connection: Any) -> None:
        now = time.monotonic()
        statement = select(workers.c.id, workers.c.beats, workers.c.jobs)
        rows = await connection.execute(statement.where(workers.c.queue == self._identity.queue))
        watched = now - self._looked <= BLINK
        seen = {}
        for id_, beats, jobs in rows:
            last = self.seen.get(id_)
            if last is None or last.beats != beats:
                seen[id_] = Seen(beats, now, NEVER if last is None else self._looked, jobs)
            else:
                seen[id_] = Seen(beats, last.since if watched else now, last.after, jobs)
        self._looked, self.seen = now, seen
        own = self._identity.id
        self.dead = {id_: worker for id_, worker in seen.items() if now - worker.since > DEAD and id_ != own}

    @property
    def leads(self) -> bool:
        """Whether this worker, of those alive, is the eldest: the one that looks after the others' jobs."""
        return min(self.living, default=None) == self._identity.id

    @property
    def living(self) -> dict[UUID, Seen]:
        return {id_: seen for id_, seen in self.seen.items() if id_ not in self.dead}

    @property
    def held(self) -> set[tuple[str, int]]:
        """The jobs, and their attempts, that living workers say they run."""
        return {(job, told["attempt"]) for seen in self.living.values() for job, told in seen.jobs.items()}

    def all_heard_since(self, moment: float) -> bool:
        """Whether every living worker has said since then what it runs."""
        return all(seen.after > moment for seen in self.living.values())
