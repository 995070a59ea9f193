"""What became of the attempts at a job that did not succeed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - FastAPI reads the annotations of a report
from typing import TYPE_CHECKING
from uuid import UUID  # noqa: TC003 - as above

from sqlalchemy import select

from coord.cancellation import interruptible
from coord.database.engine import session_of
from coord.jobs.model import attempts, execute

if TYPE_CHECKING:
    from coord.database.engine import AnySession


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """An attempt that did not succeed."""

    number: int
    outcome: str
    """`retried`, `failed`, `cancelled`, or `died` with its worker."""
    worker: UUID | None
    host: str | None
    pid: int | None
    began: datetime | None
    """By the worker's clock; None of one that died, whose worker has not said."""
    ended: datetime
    error: str | None
    """In one line."""
    traceback: str | None


async def list_attempts(session: AnySession, job_id: UUID) -> list[AttemptReport]:
    """The attempts at a job that did not succeed, in order; none of a job that the ledger does not have.

    Joins the session's transaction. They leave the ledger with their job.
    """
    names = AttemptReport.__slots__
    found = select(*(attempts.c[name] for name in names)).where(attempts.c.job_id == job_id)
    rows = await interruptible(session_of(session).run_sync(execute, found.order_by(attempts.c.number)))
    return [AttemptReport(**row) for row in rows.mappings()]
