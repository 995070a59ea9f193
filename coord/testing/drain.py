"""What is due, run now: by the test and not by a worker."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, or_, select

from coord.database.engine import session_of
from coord.durations import seconds
from coord.jobs.model import is_queued, jobs, queues
from coord.observation import PUT_OFF
from coord.testing.attempts import attempting
from coord.testing.clock import Clock
from coord.testing.rollback import connection_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from coord.database.engine import AnySession
    from coord.durations import Seconds
    from coord.testing.attempts import Attempts

MAX_ATTEMPTS_RUN = 1_000
NOT_MOVED = (
    "drain_jobs cannot move PostgreSQL's clock on: sessions set a search_path of their own as they begin, and the "
    "moved now() is found by that. Leave it out of this test's, or drain without ahead= and until="
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """How many attempts have ended how."""

    done: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    """Attempts that failed, and after which the job was queued again."""
    superseded: int = 0
    """Attempts that were not the one to apply their effect."""
    put_off: int = 0
    """Attempts that were not begun, since the function refuses the arguments."""


async def drain_jobs(
    tasks: type | Sequence[Any],
    /,
    *,
    session: AnySession,
    queue: str | None = None,
    ahead: Seconds | None = None,
    until: datetime | None = None,
    with_retries: bool = True,
    limit: int = MAX_ATTEMPTS_RUN,
    ctx: Mapping[Any, Any] | None = None,
) -> Drained:
    """Run the jobs that are due, and those that they enqueue, within the session's transaction; commits nothing.

    `tasks` are the functions, or your worker's `Settings`. Jobs of `queue`, or of all queues, run one after another as
    `perform` runs them: by priority, then by the time at which they are due; those of a paused queue do not. A failed
    attempt that is worth another is followed by it at once, or with `with_retries=False` not any more.

    With `ahead`, in seconds, or `until`, an aware time, PostgreSQL's clock is moved on from one job to the next until
    then, without sleeping: `now()` and what coord schedules follow it, `CURRENT_TIMESTAMP`, column defaults that are
    made by the server and Python's clock do not.

        assert await drain_jobs([fulfil_order], session=coord_session) == Drained(done=1)

    Jobs that fail raise nothing here: the counts, the ledger and the log say it. Raises `LookupError` for a due job
    whose task is not among `tasks`, and `RuntimeError` after `limit` attempts, or if the clock cannot be moved.
    """
    end = _checked(queue, ahead, until, limit)
    await session_of(session).flush()
    clock = Clock(connection_of(session))
    with attempting(session, tasks, ctx) as attempts:
        try:
            target = end if isinstance(end, datetime) else await clock.now() + timedelta(seconds=end)
            drain = _Drain(attempts, clock, queue, target, with_retries=with_retries)
            while (job := await drain.next()) is not None:
                if drain.ended.total() >= limit:
                    raise RuntimeError(
                        f"drain_jobs has run {limit} attempts, and a job of {job.task} is still due: does a task "
                        "enqueue itself, or never end its retries? If it is meant, give it another limit="
                    )
                await drain.run(job)
        finally:
            await clock.restore()
    return Drained(**{each.name: drain.ended[each.name] for each in fields(Drained)})


class _Drain:
    """`ended` counts the attempts by their outcomes."""

    def __init__(
        self, attempts: Attempts, clock: Clock, queue: str | None, end: datetime, *, with_retries: bool
    ) -> None:
        self._attempts = attempts
        self._clock = clock
        self._end = end
        self._with_retries = with_retries
        paused = select(queues.c.name).where(queues.c.paused_at.is_not(None))
        self._here = (is_queued, jobs.c.queue.not_in(paused), *([jobs.c.queue == queue] if queue is not None else []))
        self._again: set[UUID] = set()
        """Those to be tried again at once."""
        self._left: set[UUID] = set()
        """Those that are still queued, and are left alone."""
        self.ended: Counter[str] = Counter()

    async def next(self) -> Any:
        """The first that is due, once the clock has been moved on if none is; None if there is none."""
        waited_for: UUID | None = None
        while True:
            due = or_(jobs.c.scheduled_at <= func.statement_timestamp(), jobs.c.id.in_(self._again))
            if (job := await self._first(due, jobs.c.priority.desc())) is not None:
                return job
            later = await self._first(jobs.c.scheduled_at <= self._end)
            if later is None:
                return None
            if later.id == waited_for:
                raise RuntimeError(NOT_MOVED)
            waited_for = later.id
            await self._clock.move_to(later.scheduled_at)

    async def _first(self, condition: Any, *order: Any) -> Any:
        found = select(jobs.c.id, jobs.c.task, jobs.c.scheduled_at).where(
            *self._here, condition, jobs.c.id.not_in(self._left)
        )
        rows = await self._attempts.rows(found.order_by(*order, jobs.c.scheduled_at, jobs.c.id).limit(1))
        return rows[0] if rows else None

    async def run(self, job: Any) -> None:
        if job.task not in self._attempts.tasks:
            raise LookupError(f"a job of {job.task} is due, and drain_jobs has {', '.join(self._attempts.tasks)}")
        ended = await self._attempts.run(job.id)
        self.ended["put_off" if ended.outcome == PUT_OFF else ended.outcome] += 1
        if ended.outcome == "retried" and self._with_retries:
            self._again.add(job.id)
        elif not ended.job.state.is_final:
            self._left.add(job.id)


def _checked(queue: object, ahead: Seconds | None, until: datetime | None, limit: object) -> datetime | float:
    """When it ends, or in how many seconds."""
    if queue is not None and not isinstance(queue, str):
        raise TypeError(f"queue is a queue's name, not {queue!r}")
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit is a whole number, 1 or more, not {limit!r}")
    if until is None:
        return 0.0 if ahead is None else seconds("ahead", ahead)
    if ahead is not None:
        raise ValueError("drain_jobs takes ahead= or until=, and not both")
    if not isinstance(until, datetime) or until.utcoffset() is None:
        raise ValueError(f"until is an aware datetime, not {until!r}")
    return until
