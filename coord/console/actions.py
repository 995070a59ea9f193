"""What can be done from the console: each says first what will happen and to how many, and is done by a POST."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from coord.cancellation import interruptible
from coord.console.job import actions_of
from coord.console.listing import Filter, count_page
from coord.errors import UniqueKeyConflictError
from coord.jobs.batches import cancel_jobs, retry_jobs
from coord.jobs.model import JobState
from coord.jobs.pauses import pause_queue, resume_queue
from coord.jobs.queries import RETRYABLE_STATES, cancel_job, get_job, retry_job

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.console.desk import Desk
    from coord.fleet import Number

BULK_SECONDS = 8.0
"""For which one POST goes on, some jobs a transaction; the rest is for another one."""
MAX_QUEUE_CHARACTERS = 200
NOTICES: Mapping[str, str] = {
    "retry": "The job is queued again.",
    "cancelled": "The job is cancelled.",
    "running": "The job runs; its worker has been told to cancel it.",
    "late": "Too late: the job had ended already.",
    "refused": "Nothing was done: only a failed or cancelled job can be run again.",
    "conflict": "Nothing was done: another unfinished job has the same unique key.",
    "pause": "The queue is paused. Within two seconds no worker takes anything more of it.",
    "resume": "The queue is resumed. Within two seconds workers take its jobs again.",
}
"""By what an address says after an action, which anybody can write: no text of his is shown."""
BULK_NOTICES: Mapping[str, str] = {
    "retry": "{number} queued again.",
    "cancel": "{number} cancelled, or being cancelled by their workers.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A confirmation page."""

    title: str
    sentences: tuple[str, ...]
    button: str
    is_dangerous: bool
    fields: Mapping[str, str]
    back: str
    """Where to, if not; as seen from the console's first page."""
    possible: bool = True


def notice(given: Mapping[str, str]) -> str | None:
    """What the address says was done."""
    done, number = given.get("done", ""), given.get("number", "")
    if done in BULK_NOTICES and number.isdecimal() and len(number) < 12:
        return BULK_NOTICES[done].format(number=f"{int(number):,}") + _left(given.get("left", ""), done)
    return NOTICES.get(done)


def _left(left: str, done: str) -> str:
    if not left.isdecimal() or len(left) > 12 or not int(left):
        return ""
    why = "are left, or were told before" if done == "cancel" else "are left, or have an unfinished job with their key"
    return f" {int(left):,} {why}."


async def ask_about_job(session: AsyncSession, action: str, job_id: UUID) -> Question:
    """`RowNotFoundError` if there is none."""
    job = await get_job(session, job_id)
    said: tuple[str, ...]
    if action == "retry":
        said = (f"It is {job.state}. It will be queued with one attempt more, {job.attempt + 1}, and may run at once.",)
    elif job.state is JobState.RUNNING:
        said = ("It runs. Its worker is told, cancels the task and rolls back, unless the job is done first.",)
    else:
        said = ("It has not begun, and never will. It can be run again later.",)
    possible = action in actions_of(job)
    return Question(
        title=f"{action.capitalize()} job {job.task}?",
        sentences=said if possible else (f"It is {job.state}: there is nothing to {action}.",),
        button=f"{action.capitalize()} this job",
        is_dangerous=action == "cancel",
        fields={},
        back=f"jobs/{job_id}",
        possible=possible,
    )


async def do_to_job(session: AsyncSession, action: str, job_id: UUID) -> str:
    """Which of `NOTICES` it came to; commits."""
    if action == "cancel":
        state = await cancel_job(session, job_id)
        await session.commit()
        return str(state) if state in (JobState.CANCELLED, JobState.RUNNING) else "late"
    try:
        await retry_job(session, job_id)
    except UniqueKeyConflictError:
        return "conflict"
    except ValueError:
        return "refused"
    await session.commit()
    return "retry"


def ask_about_queue(action: str, queue: str) -> Question:
    said = {
        "pause": "Within two seconds workers take nothing more of it. What runs goes on to its end, enqueueing goes "
        "on, and what is due waits until the queue is resumed.",
        "resume": "Within two seconds workers take its jobs again, the most urgent first.",
    }
    return Question(
        title=f"{action.capitalize()} the queue {queue}?",
        sentences=(said[action],),
        button=f"{action.capitalize()} {queue}",
        is_dangerous=action == "pause",
        fields={"queue": queue},
        back="",
    )


async def do_to_queue(session: AsyncSession, action: str, queue: str) -> None:
    await (pause_queue if action == "pause" else resume_queue)(session, queue)
    await session.commit()


def queue_of(given: Mapping[str, str]) -> str:
    """`ValueError` if it is no queue's name."""
    queue = given.get("queue", "")
    if not queue or len(queue) > MAX_QUEUE_CHARACTERS or "\0" in queue:
        raise ValueError("that is not the name of a queue")
    return queue


def states_of(action: str, wanted: Filter) -> tuple[JobState, ...]:
    """Of the filter's, those that the action concerns."""
    able = RETRYABLE_STATES if action == "retry" else (JobState.QUEUED, JobState.RUNNING)
    return tuple(state for state in able if wanted.state in (None, state))


async def count_matching(session: AsyncSession, action: str, wanted: Filter) -> Number:
    """How many the action would concern."""
    first, *others = states_of(action, wanted)
    found = await count_page(session, wanted.having(first))
    for state in others:
        found += await count_page(session, wanted.having(state))
    return found


def ask_about_many(action: str, wanted: Filter, number: Number, said: str) -> Question:
    """`said` is the number in words."""
    states = " and ".join(states_of(action, wanted))
    what = wanted.having(None).words.removeprefix("jobs")
    what = f"{said} {states} job{'' if number.value == 1 else 's'}{what}"
    if action == "retry":
        then = "Each will be queued with one attempt more, and may run at once. One whose unique key an unfinished job "
        then += "has is left out; of several with one key the newest runs."
    else:
        then = "What is queued never begins. What runs is cancelled by its worker and rolled back, or is done first."
    count = "all of them" if not number.exact else "this job" if number.value == 1 else f"{said} jobs"
    return Question(
        title=f"{action.capitalize()} {what}?",
        sentences=(then, "It is done a thousand at a time, each in a transaction of its own, as they are then."),
        button=f"{action.capitalize()} {count}",
        is_dangerous=action == "cancel",
        fields=wanted.fields,
        back=f"jobs?{wanted.query()}",
        possible=number.value > 0,
    )


async def do_to_many(desk: Desk, action: str, wanted: Filter) -> str:
    """The eldest first, until none is left, or as many were done as there were, or the time is up; the query to go on.

    As many as there were: a job that is run again and fails at once is not run for ever.
    """
    async with desk.session_maker() as session:
        there = (await interruptible(count_matching(session, action, wanted))).value
    end, done = monotonic() + BULK_SECONDS, 0
    operation: Any = retry_jobs if action == "retry" else cancel_jobs
    while done < there and monotonic() < end:
        async with desk.session_maker() as session:
            some = await operation(session, **wanted.options, limit=min(1_000, there - done))
            await session.commit()
        done += some
        if not some:
            break
    left = there - done
    return urlencode({**wanted.fields, "done": action, "number": done, "left": max(0, left)})
