"""Where the time of the last waits and locks went, as this process was told: bounded, and nothing is asked for it."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import quantiles
from typing import TYPE_CHECKING

from coord.observation import Observer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coord.console.access import Viewer
    from coord.timings import AttemptTimings, WaitTimings

MAX_REMEMBERED = 1_000
PARTS = ("queue", "lock", "task", "wake", "retries")
ADVISORY = "advisory lock"
"""How one is told of, before its name."""
LOCK_OF_NOTE_SECONDS = 0.05
"""A lock that was waited for less is nothing to tell of."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Of one job, in seconds."""

    task: str | None
    """None where the wait was given only its id."""
    parts: Mapping[str, float]
    """Those that this process was told."""
    locked: str
    """What it waited for longest."""
    total: float
    told_at: datetime

    def seen_by(self, viewer: Viewer) -> Spent:
        """A reader sees the names of tables, and not those of advisory locks, which arguments are made of."""
        hides = not viewer.is_full and self.locked.startswith(ADVISORY)
        return replace(self, locked=ADVISORY) if hides else self


@dataclass(frozen=True, slots=True)
class Percentile:
    median: float
    p95: float


class Timings(Observer):
    """Of the last jobs that this process has waited for, or has run."""

    def __init__(self) -> None:
        self._of_job: OrderedDict[str, Spent] = OrderedDict()
        self._recent: deque[Spent] = deque(maxlen=MAX_REMEMBERED)

    def of(self, job_id: object) -> Spent | None:
        return self._of_job.get(str(job_id))

    def wait_answered(self, task: str | None, timings: WaitTimings) -> None:
        if timings.job_id is not None:
            spent = Spent(task, timings.parts(), timings.locked, timings.total, datetime.now(UTC))
            self._recent.append(spent)
            self._remember(timings.job_id, spent)

    def attempt_ended(self, task: str, outcome: str, timings: AttemptTimings) -> None:
        """In a process that works itself. What a wait was told has the way back as well, and stays."""
        known = self._of_job.get(timings.job_id)
        if outcome in ("done", "failed") and (known is None or "wake" not in known.parts):
            parts = {"queue": timings.queue, "lock": timings.lock, "task": timings.task}
            self._remember(timings.job_id, Spent(task, parts, timings.locked, sum(parts.values()), datetime.now(UTC)))

    def locks(self) -> Sequence[tuple[str, Spent]]:
        """By job id, those that have waited for a lock, the last first."""
        found = [(id_, each) for id_, each in self._of_job.items() if each.parts.get("lock", 0) >= LOCK_OF_NOTE_SECONDS]
        return found[::-1]

    def percentiles(self) -> Mapping[str, Percentile]:
        """Of each part, and of the total, over the last answered waits."""
        recent = [*self._recent]
        values = {name: [each.parts[name] for each in recent if name in each.parts] for name in PARTS}
        values["total"] = [each.total for each in recent]
        return {name: _percentile(each) for name, each in values.items() if each}

    @property
    def answered(self) -> int:
        return len(self._recent)

    def _remember(self, job_id: str, spent: Spent) -> None:
        self._of_job[job_id] = spent
        self._of_job.move_to_end(job_id)
        while len(self._of_job) > MAX_REMEMBERED:
            self._of_job.popitem(last=False)


def _percentile(values: Sequence[float]) -> Percentile:
    if len(values) == 1:
        return Percentile(values[0], values[0])
    cuts = quantiles(values, n=20, method="inclusive")
    return Percentile(cuts[9], cuts[18])
