"""One attempt at a job, as its task's context carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord.jobs.options import MAX_SPAN_SECONDS
from coord.timings import AttemptTimings

ATTEMPT = "coord.attempt"
"""Where it is in arq's `ctx` and in its session's `info`."""


@dataclass(slots=True, kw_only=True)
class Attempt:
    job_id: UUID
    task: str
    number: int
    arguments: str
    """As the ledger has them: the claim compares them."""
    timeout: float | None
    """Seconds that the ledger allows; None leaves it to the worker."""
    session_maker: async_sessionmaker[AsyncSession]
    max_attempts: int
    """How many may count, if the ledger has no limit."""
    worker_lock: int
    """The second half of the advisory lock of its worker."""
    idle_limit: float
    """Seconds that its transaction may do nothing."""
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    entered: bool = False
    """Whether it has come to its `job_transaction`."""
    claimed: bool = False
    """Whether that has claimed the job: what fails before has done nothing."""
    failure: BaseException | None = None
    """What has rolled it back, whether or not the task lets it through."""
    error: BaseException | None = None
    """What its executor has made of that, or of what the task has raised."""
    applied: bool = False
    """Whether its transaction has committed."""
    reason: str | None = None
    """Why it is tried again, in one line."""
    progress: Any = None
    queued: float = 0.0
    """Seconds from when it was due until it began; Redis may say anything."""
    timings: AttemptTimings = field(init=False)

    def __post_init__(self) -> None:
        queued = self.queued if 0 <= self.queued < MAX_SPAN_SECONDS else 0.0
        self.timings = AttemptTimings(str(self.job_id), self.number, queued)
