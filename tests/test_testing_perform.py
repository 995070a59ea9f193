"""`perform`: one attempt within a transaction that the test rolls back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from arq.worker import Retry, func
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from coord import (
    Job,
    JobState,
    JobSuperseded,
    LockTimeoutError,
    UniqueKeyConflictError,
    cancel_job,
    enqueue,
    get_transaction,
    job_transaction,
    list_attempts,
    lock_tables,
    set_result,
    task_options,
)
from coord.testing import perform
from coord.worker.failure import AttemptTimeoutError
from tests.models import User

if TYPE_CHECKING:
    import asyncpg
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]


async def name(ctx: dict[str, Any], user_id: int, name: str) -> str:
    async with job_transaction(ctx) as session, lock_tables(session, [User]):
        user = await session.get_one(User, user_id)
        user.name = name
    return name


async def fail_after_a_write(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session:
        session.add(User(id=user_id, name="in vain"))
        await session.flush()
        raise ZeroDivisionError("as it is")


async def be_locked_out(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session:
        session.add(User(id=user_id))
        await session.flush()
        raise LockTimeoutError("somebody has the table", tables=())


async def keep(ctx: dict[str, Any]) -> None:
    async with job_transaction(ctx) as session:
        await set_result(session, {"kept": True})


async def tell(ctx: dict[str, Any]) -> list[Any]:
    return [ctx["client"], ctx["job_try"], ctx["job_id"]]


async def sleep(ctx: dict[str, Any]) -> None:
    await asyncio.sleep(3600)


async def swallow(ctx: dict[str, Any]) -> None:
    try:
        async with job_transaction(ctx):
            raise ZeroDivisionError("swallowed")
    except ZeroDivisionError:
        pass


async def ask_for_another(ctx: dict[str, Any]) -> None:
    raise Retry(defer=3600)


async def a_user(session: AsyncSession, user_id: int = 1) -> User:
    user = User(id=user_id, name="before")
    session.add(user)
    await session.flush()
    return user


async def test_a_task_reads_what_is_pending_and_its_effect_is_in_the_tests_transaction(
    coord_session: AsyncSession, observer: asyncpg.Connection
) -> None:
    user = User(id=1, name="before")
    coord_session.add(user)
    job = await perform(name, 1, "after", session=coord_session)
    assert (job.state, job.result, job.attempt, job.arguments) == (JobState.DONE, "after", 1, [[1, "after"], {}])
    await coord_session.refresh(user)
    assert user.name == "after"
    assert await observer.fetchval("SELECT count(*) FROM users") == 0
    assert await observer.fetchval("SELECT count(*) FROM coord_jobs") == 0


async def test_the_tests_rollback_undoes_what_was_performed(coord_session: AsyncSession) -> None:
    await a_user(coord_session)
    await coord_session.commit()
    await coord_session.scalar(select(User.name))
    await perform(name, 1, "after", session=coord_session)
    await coord_session.rollback()
    assert await coord_session.scalar(select(User.name)) == "before"
    assert await coord_session.scalar(select(Job.id)) is None


async def test_an_exception_of_the_task_reaches_the_test_and_the_job_has_failed(coord_session: AsyncSession) -> None:
    with pytest.raises(ZeroDivisionError, match="as it is"):
        await perform(fail_after_a_write, 7, session=coord_session)
    assert await coord_session.get(User, 7) is None
    job = (await coord_session.scalars(select(Job))).one()
    assert (job.state, job.error) == (JobState.FAILED, "ZeroDivisionError: as it is")
    assert [each.outcome for each in await list_attempts(coord_session, job.id)] == ["failed"]


async def test_after_an_error_that_is_worth_another_attempt_the_job_is_queued_for_it(
    coord_session: AsyncSession,
) -> None:
    with pytest.raises(LockTimeoutError):
        await perform(be_locked_out, 7, session=coord_session)
    assert await coord_session.get(User, 7) is None
    job = (await coord_session.scalars(select(Job))).one()
    assert (job.state, job.attempt) == (JobState.QUEUED, 2)


async def test_the_last_attempt_of_the_options_fails_the_job(coord_session: AsyncSession) -> None:
    with pytest.raises(Retry):
        await perform(task_options(ask_for_another, max_attempts=1), session=coord_session)
    with pytest.raises(Retry):
        await perform(func(ask_for_another, name="of arq", max_tries=1), session=coord_session)
    assert {*await coord_session.scalars(select(Job.state))} == {JobState.FAILED}


async def test_an_attempt_has_the_time_that_its_options_give_it(coord_session: AsyncSession) -> None:
    with pytest.raises(AttemptTimeoutError, match=r"longer than 0\.05 s"):
        await perform(task_options(sleep, timeout=0.05), session=coord_session)


async def test_a_cancellation_of_the_test_ends_the_task(coord_session: AsyncSession) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await perform(sleep, session=coord_session)
    assert (await coord_session.scalars(select(Job.state))).one() == JobState.QUEUED


async def test_an_error_that_the_task_swallows_is_not_swallowed(coord_session: AsyncSession) -> None:
    with pytest.raises(ZeroDivisionError, match="swallowed"):
        await perform(swallow, session=coord_session)


async def test_set_result_is_the_jobs_result(coord_session: AsyncSession) -> None:
    assert (await perform(keep, session=coord_session)).result == {"kept": True}


async def test_the_context_is_what_the_worker_gives_and_what_the_test_adds(coord_session: AsyncSession) -> None:
    job = await perform(tell, session=coord_session, ctx={"client": "ours"})
    assert job.result == ["ours", 1, str(job.id)]


async def test_arguments_that_json_changes_are_refused(coord_session: AsyncSession) -> None:
    with pytest.raises(TypeError, match="JSON"):
        await perform(name, 1, ("a", "tuple"), session=coord_session)
    assert await coord_session.scalar(select(Job.id)) is None


async def test_arguments_that_the_function_refuses_are_a_type_error(coord_session: AsyncSession) -> None:
    with pytest.raises(TypeError, match="does not take these arguments"):
        await perform(name, 1, session=coord_session)


async def test_a_unique_key_runs_the_job_that_has_it(coord_session: AsyncSession) -> None:
    await a_user(coord_session)
    options = task_options(name, unique_key="user 1")
    first = await enqueue(coord_session, options, 1, "after")
    assert (await perform(options, 1, "after", session=coord_session)).id == first.id
    assert (await perform(options, 1, "again", session=coord_session)).id != first.id
    await enqueue(coord_session, options, 1, "other")
    with pytest.raises(UniqueKeyConflictError):
        await perform(options, 1, "conflicting", session=coord_session)


async def test_a_job_with_a_key_for_one_at_a_time_has_its_turn(coord_session: AsyncSession) -> None:
    await a_user(coord_session)
    for new in ("first", "second"):
        job = await perform(task_options(name, one_at_a_time="users"), 1, new, session=coord_session)
        assert job.state == JobState.DONE


async def test_a_delay_is_not_waited_for(coord_session: AsyncSession) -> None:
    job = await perform(task_options(keep, delay=3600), session=coord_session)
    assert job.state == JobState.DONE
    assert (job.scheduled_at - job.created_at).total_seconds() == 3600


async def test_an_attempt_at_a_job_that_somebody_has_cancelled_applies_nothing(coord_session: AsyncSession) -> None:
    await a_user(coord_session)

    async def cancelled(ctx: dict[str, Any]) -> None:
        await cancel_job(coord_session, ctx["job_id"])
        await coord_session.commit()
        async with job_transaction(ctx) as session:
            session.add(User(id=9))

    with pytest.raises(JobSuperseded):
        await perform(cancelled, session=coord_session)
    assert await coord_session.get(User, 9) is None
    assert (await coord_session.scalars(select(Job.state))).one() == JobState.CANCELLED


async def test_a_statement_that_fails_in_the_task_leaves_the_tests_transaction_usable(
    coord_session: AsyncSession,
) -> None:
    await a_user(coord_session)

    async def doubled(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await session.execute(text("INSERT INTO users VALUES (1, 'again')"))

    with pytest.raises(IntegrityError):
        await perform(doubled, session=coord_session)
    await perform(name, 1, "after", session=coord_session)
    assert await coord_session.scalar(select(User.name)) == "after"


async def test_it_runs_inside_a_block_of_the_tests(coord_session: AsyncSession) -> None:
    async with get_transaction(coord_session):
        user = await a_user(coord_session)
        await perform(name, 1, "after", session=coord_session)
    await coord_session.refresh(user)
    assert user.name == "after"


async def test_a_session_that_nobody_rolls_back_is_refused(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        with pytest.raises(ValueError, match="coord_session"):
            await perform(keep, session=session)


async def test_the_name_of_a_task_is_refused(coord_session: AsyncSession) -> None:
    with pytest.raises(TypeError, match="'keep' is only the name"):
        await perform("keep", session=coord_session)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a function with a name"):
        await perform(3, session=coord_session)  # type: ignore[arg-type]
