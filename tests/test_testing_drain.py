"""`drain_jobs`: what is due is run by the test, and time passes without sleeping."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from arq.worker import Retry, func
from sqlalchemy import event, select, text
from sqlalchemy import func as sql
from sqlalchemy.orm import Session

from coord import Job, JobState, enqueue, job_transaction, pause_queue, retry_job, task_options, worker_settings
from coord.testing import Drained, drain_jobs
from tests.models import User

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

HOUR = 3600


async def greet(ctx: dict[str, Any], user_id: int, name: str = "") -> None:
    async with job_transaction(ctx) as session:
        session.add(User(id=user_id, name=name))


async def fail(ctx: dict[str, Any]) -> None:
    raise ZeroDivisionError


async def fail_once(ctx: dict[str, Any], user_id: int, defer: float = 0) -> None:
    if ctx["job_try"] == 1:
        raise Retry(defer=defer)
    await greet(ctx, user_id)


async def count_down(ctx: dict[str, Any], number: int, delay: float = 0) -> None:
    async with job_transaction(ctx) as session:
        session.add(User(id=number, name=f"{await session.scalar(select(sql.now()))}"))
        if number:
            await enqueue(session, task_options(count_down, delay=delay), number - 1, delay)


async def never_end(ctx: dict[str, Any]) -> None:
    async with job_transaction(ctx) as session:
        await enqueue(session, never_end)


ALL = [greet, fail, fail_once, count_down, never_end]


async def ids(session: AsyncSession) -> list[int]:
    return [*await session.scalars(select(User.id).order_by(User.id))]


async def clock(session: AsyncSession) -> datetime:
    now: datetime = (await session.execute(select(sql.clock_timestamp()))).scalar_one()
    return now


async def test_what_is_due_is_run_and_what_the_jobs_enqueue(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, count_down, 3)
    await enqueue(coord_session, fail)
    assert await drain_jobs(ALL, session=coord_session) == Drained(done=4, failed=1)
    assert await ids(coord_session) == [0, 1, 2, 3]
    assert await drain_jobs(ALL, session=coord_session) == Drained()


async def test_jobs_run_by_priority_and_then_by_age(coord_session: AsyncSession) -> None:
    ran = []

    async def note(ctx: dict[str, Any], name: str) -> None:
        ran.append(name)

    for name, priority in (("first", 0), ("urgent", 5), ("second", 0), ("last", -5)):
        await enqueue(coord_session, task_options(note, priority=priority), name)
    assert await drain_jobs([note], session=coord_session) == Drained(done=4)
    assert ran == ["urgent", "first", "second", "last"]


async def test_a_retry_follows_at_once(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, fail_once, 1, HOUR)
    assert await drain_jobs(ALL, session=coord_session) == Drained(retried=1, done=1)
    assert await ids(coord_session) == [1]


async def test_without_retries_a_job_is_left_after_its_attempt(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, fail_once, 1)
    assert await drain_jobs(ALL, session=coord_session, with_retries=False) == Drained(retried=1)
    assert await drain_jobs(ALL, session=coord_session, ahead=HOUR) == Drained(done=1)


async def test_a_failed_job_that_another_has_run_again_is_run_again(coord_session: AsyncSession) -> None:
    mended: list[UUID] = []

    async def pay(ctx: dict[str, Any]) -> None:
        if not mended:
            raise ZeroDivisionError

    async def mend(ctx: dict[str, Any], job_id: str) -> None:
        async with job_transaction(ctx) as session:
            mended.append((await retry_job(session, UUID(job_id))).id)

    job = await enqueue(coord_session, pay)
    await enqueue(coord_session, mend, str(job.id))
    assert await drain_jobs([pay, mend], session=coord_session) == Drained(done=2, failed=1)


async def test_retries_end_with_the_attempts_that_the_job_has(coord_session: AsyncSession) -> None:
    async def always(ctx: dict[str, Any]) -> None:
        raise Retry

    await enqueue(coord_session, task_options(always, max_attempts=3))
    assert await drain_jobs([always], session=coord_session) == Drained(retried=2, failed=1)
    await enqueue(coord_session, always)
    assert await drain_jobs([func(always, max_tries=2)], session=coord_session) == Drained(retried=1, failed=1)


async def test_what_is_scheduled_runs_once_the_clock_is_moved(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, task_options(greet, delay=HOUR), 1)
    await enqueue(coord_session, task_options(greet, delay=datetime.now(UTC) + timedelta(days=400)), 2)
    assert await drain_jobs(ALL, session=coord_session) == Drained()
    assert await drain_jobs(ALL, session=coord_session, ahead=timedelta(hours=2)) == Drained(done=1)
    until = datetime.now(UTC) + timedelta(days=401)
    assert await drain_jobs(ALL, session=coord_session, until=until) == Drained(done=1)
    assert await ids(coord_session) == [1, 2]


async def test_a_job_that_a_job_schedules_counts_from_the_moved_clock(coord_session: AsyncSession) -> None:
    before = await clock(coord_session)
    await enqueue(coord_session, task_options(count_down, delay=HOUR), 5, HOUR)
    assert await drain_jobs(ALL, session=coord_session, ahead=3.5 * HOUR) == Drained(done=3)
    users = (await coord_session.scalars(select(User).order_by(User.id.desc()))).all()
    hours = [round((datetime.fromisoformat(user.name) - before).total_seconds() / HOUR, 2) for user in users]
    assert hours == [1, 2, 3]


async def test_the_clock_is_as_it_was_afterwards(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, task_options(greet, delay=HOUR), 1)
    path = await coord_session.scalar(text("SHOW search_path"))
    await drain_jobs(ALL, session=coord_session, ahead=HOUR)
    assert abs((await clock(coord_session) - datetime.now(UTC)).total_seconds()) < 60
    assert await coord_session.scalar(text("SHOW search_path")) == path


async def test_only_the_queue_that_is_named_is_drained(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, task_options(greet, queue="mail"), 1)
    await enqueue(coord_session, greet, 2)
    assert await drain_jobs(ALL, session=coord_session, queue="mail") == Drained(done=1)
    assert await ids(coord_session) == [1]


async def test_a_paused_queue_is_left_alone(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, task_options(greet, queue="mail"), 1)
    await pause_queue(coord_session, "mail")
    assert await drain_jobs(ALL, session=coord_session) == Drained()


async def test_jobs_one_at_a_time_follow_one_another(coord_session: AsyncSession) -> None:
    for number in range(3):
        await enqueue(coord_session, task_options(fail_once, one_at_a_time="users"), number)
    assert await drain_jobs(ALL, session=coord_session) == Drained(retried=3, done=3)


async def test_the_settings_of_a_worker_are_taken_with_their_hooks(
    coord_session: AsyncSession, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    ended = []

    async def after_job_end(ctx: dict[str, Any]) -> None:
        ended.append(ctx["job_try"])

    settings = worker_settings(
        [fail_once, greet],
        session_maker=session_maker,
        redis="redis://localhost",
        max_tries=1,
        after_job_end=after_job_end,
    )
    await enqueue(coord_session, fail_once, 1)
    assert await drain_jobs(settings, session=coord_session) == Drained(failed=1)
    assert ended == [1]


async def test_a_signature_that_refuses_the_arguments_puts_the_job_off(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, "greet", 1, 2, 3)
    assert await drain_jobs(ALL, session=coord_session) == Drained(put_off=1)
    assert await coord_session.scalar(select(Job.state)) == JobState.QUEUED


async def test_a_job_whose_task_is_not_given_is_an_error(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, greet, 1)
    with pytest.raises(LookupError, match="a job of greet is due, and drain_jobs has fail, fail_once"):
        await drain_jobs([fail, fail_once], session=coord_session)


async def test_a_task_that_enqueues_itself_is_stopped(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, never_end)
    with pytest.raises(RuntimeError, match="has run 7 attempts, and a job of never_end is still due"):
        await drain_jobs(ALL, session=coord_session, limit=7)
    assert await coord_session.scalar(select(sql.count()).where(Job.state == JobState.DONE)) == 7


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ahead": 1, "until": datetime.now(UTC)}, ValueError, "not both"),
        ({"ahead": -1}, ValueError, "ahead is a finite number"),
        ({"until": datetime(2030, 1, 1)}, ValueError, "aware datetime"),
        ({"until": 3}, ValueError, "aware datetime"),
        ({"limit": 0}, ValueError, "limit is a whole number"),
        ({"queue": 3}, TypeError, "queue is a queue's name"),
    ],
)
async def test_options_that_make_no_sense_are_refused(
    coord_session: AsyncSession, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await drain_jobs(ALL, session=coord_session, **options)


async def test_one_function_where_a_list_is_expected_is_refused(coord_session: AsyncSession) -> None:
    function: Any = greet
    with pytest.raises(TypeError, match=r"tasks is a list of functions, or a class .*, not <function greet"):
        await drain_jobs(function, session=coord_session)


async def test_a_class_that_is_no_settings_is_refused(coord_session: AsyncSession) -> None:
    with pytest.raises(TypeError, match="a class that worker_settings has made"):
        await drain_jobs(User, session=coord_session)


async def look_elsewhere(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session:
        session.add(User(id=user_id, name=str(await session.scalar(text("SELECT now() - pg_catalog.now()")))))
        await session.execute(text("SET LOCAL search_path = public"))


async def test_the_clock_moves_on_after_a_task_that_has_set_the_search_path(coord_session: AsyncSession) -> None:
    for hours in (1, 2):
        await enqueue(coord_session, task_options(look_elsewhere, delay=hours * HOUR), hours)
    assert await drain_jobs([look_elsewhere], session=coord_session, ahead=3 * HOUR) == Drained(done=2)
    names = (await coord_session.scalars(select(User.name).order_by(User.id))).all()
    assert [name.partition(":")[0] for name in names] == ["1", "2"]


TENANT = text("SELECT set_config('search_path', 'public', true)")


class OfATenant(Session):
    """Each transaction of which begins with a search_path."""


event.listen(OfATenant, "after_begin", lambda _session, _transaction, connection: connection.execute(TENANT))


async def test_a_clock_that_cannot_be_moved_is_told_and_waited_for_no_longer(
    coord_session_maker: async_sessionmaker[AsyncSession],
) -> None:
    async with coord_session_maker(sync_session_class=OfATenant) as session:
        await enqueue(session, task_options(greet, delay=HOUR), 1)
        assert await drain_jobs(ALL, session=session, ahead=60) == Drained()
        with pytest.raises(RuntimeError, match="cannot move PostgreSQL's clock on: sessions set a search_path"):
            await drain_jobs(ALL, session=session, ahead=HOUR)
