"""Jobs by what they are: a page at a time, by key and not by number, and how many there are of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from sqlalchemy import Float, cast, func, literal, select

from coord.console.figures import sample_of, sample_percent
from coord.fleet import MAX_EXACT_JOBS, Number
from coord.jobs.batches import conditions_of
from coord.jobs.model import JobState, execute, jobs
from coord.jobs.queries import heartbeats, in_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.jobs.queries import Beat

PAGE_SIZE = 50
MAX_FEW = 1_000
"""So many are put in order once they are found."""
MAX_TEXT = 200
"""Characters of a filter."""
AGES: Mapping[str, tuple[str, dict[str, float]]] = {
    "last-5-minutes": ("in the last 5 minutes", {"newer_than": 300}),
    "last-hour": ("in the last hour", {"newer_than": 3600}),
    "last-day": ("in the last 24 hours", {"newer_than": 86_400}),
    "over-5-minutes": ("more than 5 minutes ago", {"older_than": 300}),
    "over-an-hour": ("more than an hour ago", {"older_than": 3600}),
    "over-a-day": ("more than a day ago", {"older_than": 86_400}),
}
"""When they were enqueued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which jobs; None is any."""

    state: JobState | None = None
    task: str | None = None
    queue: str | None = None
    age: str | None = None
    """One of `AGES`."""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Filter:
        """As an address or a form has it; what is empty is any. `ValueError` of what there is not."""
        state, task, queue, age = (given.get(name) or None for name in ("state", "task", "queue", "age"))
        if age is not None and age not in AGES:
            raise ValueError(f"there is no age {age!r}")
        for text in (task, queue):
            if text is not None and (len(text) > MAX_TEXT or "\0" in text):
                raise ValueError(f"a task and a queue have at most {MAX_TEXT} characters")
        return cls(state=None if state is None else JobState(state), task=task, queue=queue, age=age)

    @property
    def ages(self) -> Mapping[str, float]:
        return {} if self.age is None else AGES[self.age][1]

    @property
    def options(self) -> dict[str, Any]:
        """For `cancel_jobs` and `retry_jobs`."""
        return {"state": self.state, "task": self.task, "queue": self.queue, **self.ages}

    @property
    def fields(self) -> dict[str, str]:
        named = {"state": self.state, "task": self.task, "queue": self.queue, "age": self.age}
        return {name: str(value) for name, value in named.items() if value is not None}

    def query(self, **more: object) -> str:
        """As a link has it."""
        return urlencode({**self.fields, **{name: str(value) for name, value in more.items()}})

    def having(self, state: JobState | None) -> Filter:
        return replace(self, state=state)

    @property
    def words(self) -> str:
        """As a sentence goes on: "failed jobs of the task x, enqueued in the last hour"."""
        said = f"{self.state} jobs" if self.state else "jobs"
        said += f" of the task {self.task}" if self.task else ""
        said += f" in the queue {self.queue}" if self.queue else ""
        return said + (f", enqueued {AGES[self.age][0]}" if self.age else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    id: UUID
    task: str
    queue: str
    state: JobState
    attempt: int
    created_at: datetime
    finished_at: datetime | None
    age: float
    """Seconds since it was enqueued."""
    due_in: float
    """Seconds until it is due."""
    error: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    jobs: Sequence[Listed]
    next: UUID | None
    """The last of this page, where there is another one."""


async def list_page(session: AsyncSession, wanted: Filter, before: UUID | None, *, few: bool) -> Listing:
    """The newest first. Joins the session's transaction, and only reads.

    Of a `few` that match all are looked for, and put in order then: in order one would read the whole ledger for them.
    """
    beats = await heartbeats(session)
    now = func.clock_timestamp()
    names = ("id", "task", "queue", "state", "attempt", "created_at", "finished_at", "error")
    age = cast(func.extract("epoch", now - jobs.c.created_at), Float).label("age")
    due_in = cast(func.extract("epoch", jobs.c.scheduled_at - now), Float).label("due_in")
    statement = select(*(jobs.c[name] for name in names), age, due_in).where(*_conditions(wanted, beats))
    if before is not None:
        statement = statement.where(jobs.c.id < before)
    if few:
        found = statement.cte("few").prefix_with("MATERIALIZED", dialect="postgresql")
        statement = select(found).order_by(found.c.id.desc())
    else:
        statement = statement.order_by(jobs.c.id.desc())
    rows = (await session.run_sync(execute, statement.limit(PAGE_SIZE + 1))).mappings().all()
    held = {(beat.id, beat.attempt) for beat in beats}
    listed = [_listed(row, held) for row in rows[:PAGE_SIZE]]
    return Listing(listed, listed[-1].id if len(rows) > PAGE_SIZE else None)


async def count_page(session: AsyncSession, wanted: Filter) -> Number:
    """How many match, exactly up to 50,000. Joins the session's transaction, and only reads."""
    conditions = _conditions(wanted, await heartbeats(session))
    some = select(jobs.c.id).where(*conditions).limit(MAX_EXACT_JOBS + 1).subquery()
    found = (await session.run_sync(execute, select(func.count()).select_from(some))).scalar_one()
    if found <= MAX_EXACT_JOBS:
        return Number(found)
    percent = await sample_percent(session)
    sample = sample_of(percent)
    stored = JobState.QUEUED if wanted.state is JobState.RUNNING else wanted.state
    own = {"state": stored, "task": wanted.task, "queue": wanted.queue}
    same = [sample.c[name] == value for name, value in own.items() if value is not None]
    for name, span in wanted.ages.items():
        then = func.now() - literal(timedelta(seconds=span))
        same.append(sample.c.created_at > then if name == "newer_than" else sample.c.created_at < then)
    about = select(func.count()).select_from(sample).where(*same)
    number = (await session.run_sync(execute, about)).scalar_one()
    return Number(max(MAX_EXACT_JOBS, round(number * 100 / percent)), exact=False)


def _conditions(wanted: Filter, beats: Sequence[Beat]) -> list[ColumnElement[bool]]:
    ages = wanted.ages.get("older_than"), wanted.ages.get("newer_than")
    return [*conditions_of(wanted.task, wanted.queue, *ages), *in_state(wanted.state, beats)]


def _listed(row: Any, held: set[tuple[UUID, int]]) -> Listed:
    fields = dict(row)
    if row["state"] is JobState.QUEUED and (row["id"], row["attempt"]) in held:
        fields["state"] = JobState.RUNNING
    return Listed(**fields)
