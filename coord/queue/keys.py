"""The keys of a queue in Redis. They share a hash tag, so that a script may use them all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from uuid import UUID

from coord.jobs.options import DEFAULT_QUEUE

NAMESPACE = "coord"
TOP_PRIORITY = 100
RANK_SHIFT = 2**42
"""Milliseconds; 139 years since 1970, and 2^53, beyond which a score is not exact, is 2,048 times as much."""
RANK_DIGITS = 3


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """Of one queue in one namespace."""

    namespace: str = NAMESPACE
    queue: str = DEFAULT_QUEUE

    @property
    def feed(self) -> str:
        """Messages of what is due, by priority and then by age."""
        return self._key("feed")

    @property
    def soon(self) -> str:
        """What is due within a minute: its rank and its message, by the time by Redis' clock."""
        return self._key("soon")

    @property
    def taken(self) -> str:
        """What workers have popped: id and attempt, by when."""
        return self._key("taken")

    @property
    def epoch(self) -> str:
        """A counter that shows whether Redis has forgotten something."""
        return self._key("epoch")

    def health(self, host: str) -> str:
        """What `arq --check` reads of the workers of a host."""
        return f"{self._key('health')}:{host}"

    def _key(self, name: str) -> str:
        return f"{{{self.namespace}:{self.queue}}}:{name}"


def rank(priority: int) -> int:
    """0 for the highest priority, 200 for the lowest."""
    return TOP_PRIORITY - priority


def rank_of(score: float) -> int:
    """Of a score in the feed, which may have any value."""
    return int(min(max(score, 0.0), 2 * TOP_PRIORITY * RANK_SHIFT) // RANK_SHIFT)


def due_of(score: float) -> float:
    """Milliseconds since 1970 by Redis' clock, of a score in the feed."""
    return math.nan if math.isinf(score) else score % RANK_SHIFT


def soon_prefix(rank: int) -> str:
    return f"{rank:0{RANK_DIGITS}d}"


def soon_member(text: str, priority: int) -> str:
    return soon_prefix(rank(priority)) + text


def taken_member(job_id: UUID, attempt: int) -> str:
    return f"{job_id}:{attempt}"
