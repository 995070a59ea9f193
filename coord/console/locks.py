"""The tree of locks as it is drawn, and the lock waits of late, kept in memory by who serves the console."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from coord.blocking import tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coord.blocking import Backend, TableLock
    from coord.console.access import Viewer
    from coord.console.timings import Timings

MAX_HISTORY = 200
MAX_SHOWN = 50
"""Lock waits of late on the page."""
SAME_WAIT_SECONDS = 1.0
"""Two looks that find a backend waiting since about the same moment have found one wait."""


@dataclass(slots=True)
class Node:
    """A backend, and those that wait behind it."""

    backend: Backend
    below: list[Node] = field(default_factory=list)

    @property
    def holds(self) -> Sequence[TableLock]:
        """Those of note: the weak ones, which every statement takes, where nothing else says why others wait."""
        strong = [lock for lock in self.backend.holds if lock.is_strong]
        return strong or ([] if self.backend.waits_for is not None else self.backend.holds)

    @property
    def behind(self) -> int:
        """How many wait below it, directly or not."""
        return sum(1 + node.behind for node in self.below)


def forest(backends: Sequence[Backend]) -> Sequence[Node]:
    """Who stands in nobody's way last: the roots with the most behind them come first."""
    roots: list[Node] = []
    path: list[Node] = []
    for depth, backend in tree(backends):
        node = Node(backend)
        del path[depth:]
        (path[-1].below if path else roots).append(node)
        path.append(node)
    return sorted(roots, key=lambda node: -node.behind)


@dataclass(slots=True, kw_only=True)
class LockWait:
    """A wait for a lock that was seen, or that a job has told of."""

    since: datetime
    seconds: float
    lock: str
    job_id: str | None
    who: str
    behind: Sequence[tuple[str | None, str]] = ()
    """Job id and name of each; empty where nobody has looked."""
    is_over: bool = False

    @property
    def ended(self) -> datetime:
        return self.since + timedelta(seconds=self.seconds)


class LockHistory:
    """Bounded, and no store of its own: what was seen while somebody looked, and what answered waits have told."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._waits: deque[LockWait] = deque(maxlen=MAX_HISTORY)
        self._open: dict[int, LockWait] = {}
        """By the backend's pid, as of the last look."""

    def note(self, backends: Sequence[Backend]) -> None:
        """One look."""
        names = {backend.pid: named(backend) for backend in backends}
        now, still = datetime.now(UTC), {}
        for backend in backends:
            if backend.waits_for is not None:
                still[backend.pid] = self._note(backend, names, now)
        for pid, wait in self._open.items():
            wait.is_over = still.get(pid) is not wait
        self._open = still

    def _note(self, backend: Backend, names: Mapping[int, tuple[str | None, str]], now: datetime) -> LockWait:
        seconds = backend.waiting_seconds or 0.0
        since, lock = now - timedelta(seconds=seconds), str(backend.waits_for)
        known = self._open.get(backend.pid)
        job_id, who = names[backend.pid]
        if known is None or known.lock != lock or abs((known.since - since).total_seconds()) > SAME_WAIT_SECONDS:
            known = LockWait(since=since, seconds=seconds, lock=lock, job_id=job_id, who=who)
            self._waits.append(known)
        if job_id is not None:  # a heartbeat names a job a moment after it began
            known.job_id, known.who = job_id, who
        known.seconds = max(known.seconds, seconds)
        known.behind = [names.get(pid, (None, f"pid {pid}")) for pid in backend.blocked_by] or known.behind
        return known

    def recent(self, viewer: Viewer) -> Sequence[LockWait]:
        """The last first."""
        seen = {wait.job_id for wait in self._waits}
        told = [
            LockWait(
                since=spent.told_at - timedelta(seconds=spent.parts["lock"]),
                seconds=spent.parts["lock"],
                lock=spent.seen_by(viewer).locked,
                job_id=job_id,
                who=spent.task or "job",
                is_over=True,
            )
            for job_id, spent in self._timings.locks()
            if job_id not in seen
        ]
        return sorted([*self._waits, *told], key=lambda wait: wait.ended, reverse=True)[:MAX_SHOWN]


def named(backend: Backend) -> tuple[str | None, str]:
    """The job's id, if it is one's, and a name for it."""
    if backend.job is not None:
        return str(backend.job.id), backend.job.task
    return None, f"{backend.application_name or 'a session'}, pid {backend.pid}"
