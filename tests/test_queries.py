"""Looking at jobs, cancelling them, running them again: in the caller's transaction, never waiting for a job."""

from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import anyio
import pytest
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from coord import (
    Coordinator,
    JobState,
    JobSuperseded,
    RowNotFoundError,
    UniqueKeyConflictError,
    cancel_job,
    enqueue,
    get_job,
    get_transaction,
    job_transaction,
    list_jobs,
    retry_job,
    set_progress,
    set_result,
    task_options,
)
from coord.jobs.attempt import ATTEMPT
from tests.ledger import a_task, committed, delivered
from tests.models import User
from tests.serving import engine_at, eventually
from tests.shop import waiting_for_locks
from tests.workers import KEYS

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncSession

    from coord import Job

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")

NOBODY = UUID(int=7)


async def beats(observer: Connection, *jobs: tuple[Job, int], ago: float = 0.0, progress: Any = None) -> UUID:
    """The heartbeat of a worker that says that it runs these jobs, in these attempts."""
    worker = uuid4()
    told = {str(job.id): {"attempt": attempt, "progress": progress} for job, attempt in jobs}
    await observer.execute(
        """
        INSERT INTO coord_workers (id, queue, host, pid, beat_at, jobs)
        VALUES ($1, 'default', 'here', 1, clock_timestamp() - $2::interval, $3)
        """,
        worker,
        timedelta(seconds=ago),
        json.dumps(told),
    )
    return worker


async def ended(observer: Connection, job: Job, state: str, **values: Any) -> None:
    await observer.execute(
        """
        UPDATE coord_jobs SET state = $2, finished_at = now(), error = 'KeyError: 1', traceback = 'Traceback',
        attempt = $3, max_attempts = $4 WHERE id = $1
        """,
        job.id,
        state,
        values.get("attempt", 1),
        values.get("attempts"),
    )


async def row_of(observer: Connection, job: Job) -> Any:
    return await observer.fetchrow("SELECT * FROM coord_jobs WHERE id = $1", job.id)


# Looking


async def test_get_job_tells_all_there_is(session_maker: SessionMaker, observer: Connection) -> None:
    options = task_options(a_task, unique_key="k", queue="slow", delay=60)
    job = await committed(session_maker, options, 5, name="x")
    async with session_maker() as session:
        report = await get_job(session, job.id)
        assert (report.id, report.task, report.queue, report.state) == (job.id, "a_task", "slow", JobState.QUEUED)
        assert (report.attempt, report.arguments, report.unique_key) == (1, [[5], {"name": "x"}], "k")
        assert (report.scheduled_at, report.created_at) == (job.scheduled_at, job.created_at)
        assert (report.started_at, report.finished_at, report.error, report.result) == (None, None, None, None)
        assert (report.progress, report.worker) == (None, None)
    async with job_transaction(delivered(job, session_maker)) as session:
        await set_result(session, {"a": 1})
    async with session_maker() as session:
        report = await get_job(session, job.id)
        assert (report.state, report.result) == (JobState.DONE, {"a": 1})
        assert report.finished_at is not None


async def test_an_unknown_job_is_not_found(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        for operation in (get_job, cancel_job, retry_job):
            with pytest.raises(RowNotFoundError, match=str(NOBODY)):
                await operation(session, NOBODY)


async def test_the_operations_join_the_callers_transaction_and_flush_nothing(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        pending = User(id=1)
        session.add(pending)
        job = await enqueue(session, a_task)
        assert (await get_job(session, job.id)).state is JobState.QUEUED
        assert [report.id for report in await list_jobs(session)] == [job.id]
        assert await cancel_job(session, job.id) is JobState.CANCELLED
        assert (await retry_job(session, job.id)).attempt == 2
        assert pending in session.new
        await session.rollback()
        assert await list_jobs(session) == []


async def test_running_is_what_a_living_worker_says_of_this_attempt(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:

    async def state() -> tuple[JobState, UUID | None, Any]:
        async with session_maker() as session:
            report = await get_job(session, job.id)
            assert await list_jobs(session) == [report]
            return report.state, report.worker, report.progress

    await beats(observer, (job, 1), ago=60)
    assert await state() == (JobState.QUEUED, None, None), "its worker is dead"
    await beats(observer, (job, 2))
    assert await state() == (JobState.QUEUED, None, None), "it is another attempt"
    worker = await beats(observer, (job, 1), progress={"done": 3})
    assert await state() == (JobState.RUNNING, worker, {"done": 3})
    await ended(observer, job, "done")
    assert await state() == (JobState.DONE, None, None)


async def test_a_list_is_of_the_state_and_task_that_was_asked_for(
    session_maker: SessionMaker, observer: Connection
) -> None:
    made = {name: await committed(session_maker, "a") for name in ("queued", "running", "done", "failed", "cancelled")}
    other = await committed(session_maker, "b")
    stale = await committed(session_maker, "a")
    for name in ("done", "failed", "cancelled"):
        await ended(observer, made[name], name)
    await beats(observer, (made["running"], 1), (made["done"], 1), (stale, 2))
    async with session_maker() as session:

        async def ids(**filters: Any) -> list[UUID]:
            return [report.id for report in await list_jobs(session, **filters)]

        newest_first = [stale.id, other.id, *(job.id for job in reversed(made.values()))]
        assert await ids() == newest_first
        assert await ids(task="a") == [id_ for id_ in newest_first if id_ != other.id]
        assert await ids(task="c") == []
        assert await ids(state="queued") == [stale.id, other.id, made["queued"].id]
        assert await ids(state="queued", task="b") == [other.id]
        for name in ("running", "done", "failed", "cancelled"):
            assert await ids(state=name) == [made[name].id]
            assert await ids(state=JobState(name)) == [made[name].id]
            assert {report.state for report in await list_jobs(session, state=name)} == {JobState(name)}


async def test_no_job_is_running_without_a_worker(session_maker: SessionMaker, job: Job) -> None:
    async with session_maker() as session:
        assert await list_jobs(session, state="running") == []
        assert [report.id for report in await list_jobs(session, state="queued")] == [job.id]


async def test_pages_go_on_where_the_last_one_ended(session_maker: SessionMaker) -> None:
    made = [(await committed(session_maker, a_task, n)).id for n in range(7)]
    found: list[UUID] = []
    before: UUID | None = None
    async with session_maker() as session:
        while page := await list_jobs(session, limit=3, before=before):
            assert len(page) <= 3
            found += [report.id for report in page]
            before = page[-1].id
            await committed(session_maker, "newer")
    assert found == made[::-1]


@pytest.mark.parametrize("limit", [0, -1, 1001, 2.0, "5", None])
async def test_a_limit_outside_its_range_is_refused(session_maker: SessionMaker, limit: Any) -> None:
    async with session_maker() as session:
        with pytest.raises(ValueError, match="limit"):
            await list_jobs(session, limit=limit)
        assert not session.in_transaction()


@pytest.mark.parametrize("state", ["", "QUEUED", "nonsense", 5])
async def test_an_unknown_state_is_refused(session_maker: SessionMaker, state: Any) -> None:
    async with session_maker() as session:
        with pytest.raises(ValueError, match="JobState"):
            await list_jobs(session, state=state)
        assert not session.in_transaction()


# Cancelling


async def test_a_queued_job_is_cancelled_with_the_callers_commit(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    async with session_maker() as session:
        assert await cancel_job(session, job.id) is JobState.CANCELLED
        assert (await row_of(observer, job))["state"] == "queued"
        await session.rollback()
        assert (await row_of(observer, job))["state"] == "queued"
        assert await cancel_job(session, job.id) is JobState.CANCELLED
        await session.commit()
    row = await row_of(observer, job)
    assert row["state"] == "cancelled"
    assert row["finished_at"] is not None
    with pytest.raises(JobSuperseded):
        async with job_transaction(delivered(job, session_maker)):
            pass
    assert await observer.fetch("SELECT job_id FROM coord_cancellations") == [], "nobody runs it"


@pytest.mark.parametrize("applied", [True, False])
async def test_cancelling_a_job_never_waits_for_its_transaction_and_leaves_a_wish(
    session_maker: SessionMaker, observer: Connection, applied: bool, job: Job
) -> None:
    async with session_maker() as session:
        with contextlib.suppress(ZeroDivisionError):
            async with job_transaction(delivered(job, session_maker)):
                async with asyncio.timeout(2):
                    assert await cancel_job(session, job.id) is JobState.RUNNING
                    await session.commit()
                    assert await cancel_job(session, job.id) is JobState.RUNNING
                    await session.commit()
                assert await observer.fetch("SELECT job_id FROM coord_cancellations") == [(job.id,)]
                if not applied:
                    raise ZeroDivisionError
    assert (await row_of(observer, job))["state"] == ("done" if applied else "queued")


@pytest.mark.parametrize("progress", ["a\0b", "\ud800", {"\0": 1}])
async def test_a_job_in_its_turn_is_cancelled_whatever_progress_was_said(
    session_maker: SessionMaker, observer: Connection, ledger: None, progress: Any
) -> None:
    """PostgreSQL stores JSON that it cannot take apart; whose progress it is does not matter."""
    jobs = [await committed(session_maker, task_options(a_task, one_at_a_time=key)) for key in ("a", "b")]
    await observer.execute("UPDATE coord_jobs SET turn = attempt")
    await beats(observer, (jobs[0], 1), progress=progress)
    async with session_maker() as session:
        assert [await cancel_job(session, job.id) for job in jobs] == ["running", "cancelled"]
        await session.commit()


async def test_a_job_is_found_and_cancelled_however_many_others_run(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    """PostgreSQL takes 32,767 parameters in a statement."""
    others = {str(uuid4()): {"attempt": 1} for _ in range(17_000)}
    await beats(observer)
    await observer.execute("UPDATE coord_workers SET jobs = $1", json.dumps(others))
    async with session_maker() as session:
        assert [each.id for each in await list_jobs(session, state="queued")] == [job.id]
        assert await list_jobs(session, state="running") == []
        assert await cancel_job(session, job.id) is JobState.CANCELLED
        await session.commit()


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
async def test_it_is_too_late_to_cancel_what_has_ended(
    session_maker: SessionMaker, observer: Connection, state: str, job: Job
) -> None:
    await ended(observer, job, state)
    before = await row_of(observer, job)
    async with session_maker() as session:
        assert await cancel_job(session, job.id) is JobState(state)
        await session.commit()
    assert await row_of(observer, job) == before
    assert await observer.fetch("SELECT job_id FROM coord_cancellations") == []


async def test_a_job_cancelled_in_the_transaction_that_made_it_never_was_to_be_run(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker() as session:
        job = await enqueue(session, a_task)
        assert await cancel_job(session, job.id) is JobState.CANCELLED
        await session.commit()
    assert (await row_of(observer, job))["state"] == "cancelled"


async def test_a_hundred_cancel_one_job_at_once(session_maker: SessionMaker, observer: Connection, job: Job) -> None:

    async def cancel() -> JobState:
        async with session_maker() as session:
            state = await cancel_job(session, job.id)
            await session.commit()
            return state

    async with asyncio.timeout(5):
        states = await asyncio.gather(*(cancel() for _ in range(100)))
    assert set(states) <= {JobState.CANCELLED, JobState.RUNNING}
    assert (await row_of(observer, job))["state"] == "cancelled"


@pytest.mark.parametrize("first", ["commit", "rollback"])
@pytest.mark.parametrize("running", [True, False])
async def test_who_cancels_a_job_does_not_wait_for_somebody_else_who_does(
    session_maker: SessionMaker, observer: Connection, first: str, running: bool, job: Job
) -> None:
    """Whatever becomes of the first transaction, the second one's wish counts."""
    with contextlib.suppress(ZeroDivisionError):
        async with contextlib.AsyncExitStack() as stack:
            if running:
                await stack.enter_async_context(job_transaction(delivered(job, session_maker)))
            one, two = [await stack.enter_async_context(session_maker()) for _ in range(2)]
            await cancel_job(one, job.id)
            async with asyncio.timeout(2):
                assert await cancel_job(two, job.id) is JobState.RUNNING
                await two.commit()
            await getattr(one, first)()
            assert await observer.fetchval("SELECT count(*) FROM coord_cancellations") > 0
            raise ZeroDivisionError
    with pytest.raises(JobSuperseded):
        async with job_transaction(delivered(job, session_maker)):
            pass


@pytest.mark.parametrize("made", ["inside", "outside"])
async def test_a_cancellation_goes_with_its_savepoint(session_maker: SessionMaker, redis_url: str, made: str) -> None:
    """What is enqueued, or enqueued again, outside the savepoint that was rolled back is handed over and runs."""
    async with Redis.from_url(redis_url) as redis, Coordinator(session_maker, redis=redis_url):
        await redis.flushdb()
        options = task_options(a_task, unique_key="once")
        async with session_maker() as session:
            kept = await enqueue(session, options) if made == "outside" else None
            with contextlib.suppress(ZeroDivisionError):
                async with get_transaction(session):
                    job = kept or await enqueue(session, options)
                    assert await cancel_job(session, job.id) is JobState.CANCELLED
                    raise ZeroDivisionError
            kept = kept or await enqueue(session, options)
            assert not kept.joined
            await session.commit()

        async def feed() -> list[bytes]:
            found: list[bytes] = await redis.zrange(KEYS.feed, 0, -1)
            return found

        (message,) = await eventually(feed)
        assert str(kept.id) in message.decode()
        await redis.flushdb()
    async with job_transaction(delivered(kept, session_maker)):
        pass
    async with session_maker() as session:
        assert (await get_job(session, kept.id)).state is JobState.DONE


# Running again


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_a_job_that_has_failed_or_was_cancelled_runs_again(
    session_maker: SessionMaker, observer: Connection, state: str
) -> None:
    job = await committed(session_maker, a_task, 5)
    await ended(observer, job, state)
    await observer.execute("INSERT INTO coord_cancellations (job_id) VALUES ($1)", job.id)
    async with session_maker() as session:
        again = await retry_job(session, job.id)
        assert (await row_of(observer, job))["state"] == state
        await session.commit()
    assert (again.id, again.state, again.attempt, again.arguments) == (job.id, JobState.QUEUED, 2, [[5], {}])
    row = await row_of(observer, job)
    assert (row["state"], row["attempt"], row["max_attempts"], row["error"]) == ("queued", 2, None, "KeyError: 1")
    assert (row["finished_at"], row["started_at"]) == (None, None)
    assert datetime.now(UTC) - row["scheduled_at"] < timedelta(seconds=5)
    assert await observer.fetch("SELECT job_id FROM coord_cancellations") == [], "it would be cancelled at once"
    with pytest.raises(JobSuperseded):
        async with job_transaction(delivered(job, session_maker)):
            pass
    async with job_transaction(delivered(again, session_maker)):
        pass
    assert (await row_of(observer, job))["state"] == "done"


@pytest.mark.parametrize(("attempt", "attempts", "raised"), [(3, 3, 4), (5, 3, 6), (1, 3, 3), (3, None, None)])
async def test_there_is_always_one_attempt_more(
    session_maker: SessionMaker, observer: Connection, attempt: int, attempts: int | None, raised: int | None, job: Job
) -> None:
    await ended(observer, job, "failed", attempt=attempt, attempts=attempts)
    async with session_maker() as session:
        again = await retry_job(session, job.id)
        await session.commit()
    assert (again.attempt, again.max_attempts) == (attempt + 1, raised)


@pytest.mark.parametrize("state", ["done", "queued"])
async def test_a_done_or_unfinished_job_is_not_retried(
    session_maker: SessionMaker, observer: Connection, state: str, job: Job
) -> None:
    await ended(observer, job, state)
    before = await row_of(observer, job)
    async with session_maker() as session:
        session.add(User(id=1))
        with pytest.raises(ValueError, match=f"{job.id} is {state}"):
            await retry_job(session, job.id)
        await session.commit()
    assert await row_of(observer, job) == before
    assert await observer.fetchval("SELECT count(*) FROM users") == 1, "a refusal has cost the caller its transaction"


async def test_retrying_a_job_never_waits_for_its_transaction(session_maker: SessionMaker, job: Job) -> None:
    async with job_transaction(delivered(job, session_maker)), session_maker() as session:
        async with asyncio.timeout(2):
            with pytest.raises(ValueError, match="queued"):
                await retry_job(session, job.id)


@pytest.mark.parametrize("running", [True, False])
async def test_a_unique_key_that_another_job_has_meanwhile_is_a_conflict_at_once(
    session_maker: SessionMaker, observer: Connection, running: bool
) -> None:
    options = task_options(a_task, unique_key="k")
    failed = await committed(session_maker, options)
    await ended(observer, failed, "failed")
    other = await committed(session_maker, options)
    async with contextlib.AsyncExitStack() as stack:
        if running:
            await stack.enter_async_context(job_transaction(delivered(other, session_maker)))
        async with session_maker() as session, asyncio.timeout(2):
            session.add(User(id=1))
            with pytest.raises(UniqueKeyConflictError, match=str(failed.id)):
                await retry_job(session, failed.id)
            await session.commit()
    assert (await row_of(observer, failed))["state"] == "failed"
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


async def test_a_unique_key_that_another_job_gets_at_the_same_time_is_a_conflict_too(
    session_maker: SessionMaker, observer: Connection
) -> None:
    options = task_options(a_task, unique_key="k")
    failed = await committed(session_maker, options)
    await ended(observer, failed, "failed")

    async def retry() -> None:
        async with session_maker() as session:
            session.add(User(id=1))
            with pytest.raises(UniqueKeyConflictError):
                await retry_job(session, failed.id)
            await session.commit()

    async with session_maker() as session:
        await enqueue(session, options)
        retrying = asyncio.create_task(retry())
        await eventually(lambda: waiting_for_locks(observer, "UPDATE coord_jobs"))
        await session.commit()
    await retrying
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


async def test_of_two_who_retry_a_job_at_once_one_does(session_maker: SessionMaker, observer: Connection) -> None:
    job = await committed(session_maker)
    await ended(observer, job, "failed")
    async with session_maker() as one, session_maker() as other:
        await retry_job(one, job.id)
        second = asyncio.create_task(retry_job(other, job.id))
        await eventually(lambda: waiting_for_locks(observer, "UPDATE coord_jobs"))
        await one.commit()
        with pytest.raises(ValueError, match="only a failed or cancelled one"):
            await second
    assert (await row_of(observer, job))["attempt"] == 2


async def test_an_error_of_the_callers_own_is_no_conflict(session_maker: SessionMaker, observer: Connection) -> None:
    """Its pending rows are not flushed in the middle of a retry."""
    await observer.execute("INSERT INTO users VALUES (1, '')")
    job = await committed(session_maker, task_options(a_task, unique_key="k"))
    await ended(observer, job, "failed")
    async with session_maker() as session:
        session.add(User(id=1))
        assert (await retry_job(session, job.id)).attempt == 2


async def test_a_savepoint_takes_a_retry_back(session_maker: SessionMaker, observer: Connection, job: Job) -> None:
    await ended(observer, job, "failed")
    async with session_maker() as session:
        async with session.begin_nested() as savepoint:
            await retry_job(session, job.id)
            await savepoint.rollback()
        await session.execute(text("SELECT 1"))
        await session.commit()
    assert (await row_of(observer, job))["state"] == "failed"


# Progress


async def test_progress_is_what_it_was_when_it_was_said(session_maker: SessionMaker, job: Job) -> None:
    """The heartbeat's thread reads it at any time."""
    ctx = delivered(job, session_maker)
    value: dict[str, Any] = {"done": [1]}
    set_progress(ctx, value)
    value["done"].append(object())
    assert ctx[ATTEMPT].progress == {"done": [1]}
    set_progress(ctx, 0.5)
    assert ctx[ATTEMPT].progress == 0.5


@pytest.mark.parametrize("value", [(1,), {1: 2}, float("nan"), object(), b"", {"a": {1, 2}}])
async def test_progress_that_json_would_change_is_refused(session_maker: SessionMaker, value: Any) -> None:
    ctx = delivered(await committed(session_maker), session_maker)
    set_progress(ctx, "before")
    with pytest.raises(TypeError, match="progress"):
        set_progress(ctx, value)
    assert ctx[ATTEMPT].progress == "before"


@pytest.mark.parametrize("ctx", [{}, {ATTEMPT: None}, {"job_id": "abc"}])
def test_progress_belongs_to_a_job_of_the_ledger(ctx: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="set_progress"):
        set_progress(ctx, 1)


async def test_a_retry_that_anyio_cancels_waits_in_postgresql_no_longer(
    observer: Connection, database_url: str, job: Job
) -> None:
    """Its backend is one that does not look whether its client is there."""
    await ended(observer, job, "failed")
    async with engine_at(database_url) as engine, async_sessionmaker(engine)() as session, observer.transaction():
        await observer.execute("SELECT FROM coord_jobs FOR UPDATE")
        async with anyio.create_task_group() as group:
            group.start_soon(retry_job, session, job.id)
            await eventually(lambda: waiting_for_locks(observer))
            group.cancel_scope.cancel()

        async def nobody_waits() -> bool:
            return await waiting_for_locks(observer) == 0

        await eventually(nobody_waits)
