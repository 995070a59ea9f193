"""`enqueue_many`: one statement for any number of calls, each with what `enqueue` promises of one."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from coord import UniqueKeyConflictError, call, cancel_job, enqueue, enqueue_many, job_transaction, task_options
from coord.jobs.bulk import SLICE
from tests.ledger import a_task, committed, delivered, executed
from tests.serving import eventually
from tests.workers import Office, working

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    from coord import Call, Job

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")

JOBS = 4_000
COLUMNS = """
    SELECT task, queue, arguments::text, state, attempt, max_attempts, timeout, unique_key, priority, one_at_a_time,
        trace::text, round(extract(epoch FROM scheduled_at - created_at))::int AS delay, result::text
    FROM coord_jobs WHERE id = $1
"""


async def count(observer: Connection) -> int:
    found: int = await observer.fetchval("SELECT count(*) FROM coord_jobs")
    return found


async def blocked(observer: Connection) -> bool:
    return bool(await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))


async def test_many_jobs_are_made_by_one_statement_and_with_the_transaction(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection
) -> None:
    async with session_maker() as session:
        with executed(engine) as seen:
            found = await enqueue_many(session, [call(a_task, number, name="x") for number in range(5)])
        assert len([statement for statement in seen if "coord_jobs" in statement]) == 1
        assert await count(observer) == 0
        await session.commit()
    assert await count(observer) == 5
    assert [job.arguments for job in found] == [[[number], {"name": "x"}] for number in range(5)]
    async with session_maker() as session:
        await enqueue_many(session, [call(a_task), call(a_task)])
        await session.rollback()
    assert await count(observer) == 5


async def test_none_are_made_of_no_calls(session_maker: SessionMaker, observer: Connection) -> None:
    async with session_maker() as session:
        assert await enqueue_many(session, iter([])) == []
        await session.commit()
    assert await count(observer) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delay": 90.5, "queue": 'a "queue"', "max_attempts": 3, "timeout": 2.5, "priority": -7},
        {"unique_key": "kéy\n", "one_at_a_time": "stock"},
        {"delay": datetime.now(UTC) + timedelta(hours=5)},
        {"delay": datetime(1, 1, 1, tzinfo=UTC)},
    ],
)
async def test_a_job_of_many_is_stored_as_one_alone_would_be(
    session_maker: SessionMaker, observer: Connection, options: dict[str, Any]
) -> None:
    arguments = ["\\u0000", "tea \u2603 '", 1.50, None, [], {"a": {"b": [1e300, -0.0]}}, "\0"]
    alone = await committed(session_maker, task_options(a_task, **options), *arguments, name="x")
    expected = dict(await observer.fetchrow(COLUMNS, alone.id))
    await observer.execute("DELETE FROM coord_jobs")
    async with session_maker() as session:
        [job] = await enqueue_many(session, [call(task_options(a_task, **options), *arguments, name="x")])
        await session.commit()
    assert dict(await observer.fetchrow(COLUMNS, job.id)) == expected
    told = {name: getattr(job, name) for name in (*options, "arguments", "state", "attempt") if name != "delay"}
    assert told == {name: getattr(alone, name) for name in told}
    assert abs(job.due_in - alone.due_in) < 5
    assert job.scheduled_at == await observer.fetchval("SELECT scheduled_at FROM coord_jobs")


async def test_a_job_of_many_is_claimed_with_the_arguments_it_was_given(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        [job] = await enqueue_many(session, [call(a_task, "ü\0", 1.10, [None])])
        await session.commit()
    async with job_transaction(delivered(job, session_maker)):
        """Claimed: it is not superseded."""


async def test_what_no_call_can_be_is_refused_before_any_sql(session_maker: SessionMaker) -> None:
    with pytest.raises(TypeError, match="would arrive as"):
        call(a_task, (1, 2))
    with pytest.raises(TypeError, match="lambda"):
        call(lambda ctx: None)  # type: ignore[call-overload]
    async with session_maker() as session:
        with pytest.raises(TypeError, match="made by call"):
            await enqueue_many(session, [a_task])  # type: ignore[list-item]
        assert not session.in_transaction()


# Unique keys


async def test_calls_join_what_is_unfinished_under_their_keys(
    session_maker: SessionMaker, observer: Connection
) -> None:
    keyed = task_options(a_task, unique_key="a")
    there = await committed(session_maker, keyed, 1)
    other = task_options(a_task, unique_key="b")
    async with session_maker() as session:
        found = await enqueue_many(session, [call(keyed, 1), call(a_task, 2), call(other, 3), call(other, 3)])
        await session.commit()
    assert [job.joined for job in found] == [True, False, False, False]
    assert found[0].id == there.id
    assert found[2].id == found[3].id
    assert await count(observer) == 3


@pytest.mark.parametrize("among", [True, False], ids=["among themselves", "with what is there"])
async def test_a_conflict_leaves_none_of_the_jobs(
    session_maker: SessionMaker, observer: Connection, among: bool
) -> None:
    keyed = task_options(a_task, unique_key="a")
    if not among:
        await committed(session_maker, keyed, 1)
    async with session_maker() as session:
        with pytest.raises(UniqueKeyConflictError):
            await enqueue_many(session, [call(a_task, 7), call(keyed, 1 if among else 2), call(keyed, 2)])
        await session.commit()
    assert await count(observer) == (0 if among else 1)


@pytest.mark.parametrize("same", [True, False])
async def test_a_job_that_comes_between_is_joined_or_leaves_none_of_the_others(
    session_maker: SessionMaker, observer: Connection, same: bool
) -> None:
    keyed = task_options(a_task, unique_key="a")
    async with session_maker() as first, session_maker() as second:
        there = await enqueue(first, keyed, 1)
        waiting = asyncio.create_task(enqueue_many(second, [call(a_task, 7), call(keyed, 1 if same else 2)]))
        await eventually(lambda: blocked(observer))
        await first.commit()
        if same:
            found = await waiting
            assert (found[1].id, found[1].joined) == (there.id, True)
        else:
            with pytest.raises(UniqueKeyConflictError):
                await waiting
        await second.commit()
    assert await count(observer) == (2 if same else 1)


async def test_many_calls_do_not_wait_for_a_job_with_their_key_that_runs(session_maker: SessionMaker) -> None:
    keyed = task_options(a_task, unique_key="a")
    job = await committed(session_maker, keyed, 1)
    async with job_transaction(delivered(job, session_maker)), session_maker() as session:
        async with asyncio.timeout(5):
            [found] = await enqueue_many(session, [call(keyed, 1)])
        assert found.joined


# The crowd


@pytest.mark.slow
async def test_thousands_of_jobs_are_handed_over_in_batches_while_the_event_loop_goes_on(
    office: Office, observer: Connection
) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    calls = [call(task_options(a_task, unique_key=f"order {number}"), number) for number in range(JOBS)]
    async with office.session_maker() as session:
        counting = asyncio.create_task(count_turns())
        await enqueue_many(session, calls)
        counting.cancel()
        await session.commit()
    assert turns > 2 * JOBS // SLICE
    assert await count(observer) == JOBS
    await office.waiting(JOBS, within=30)


async def test_jobs_of_many_run_each_once_in_their_queues(office: Office) -> None:
    seen: list[int] = []

    async def task(ctx: dict[str, Any], number: int) -> None:
        seen.append(number)

    async with working(office, [task]), working(office, [task], queue="other"):
        async with office.session_maker() as session:
            tasks = [task_options(task, queue=queue) for queue in ("default", "other")]
            found = await enqueue_many(session, [call(each, number) for each in tasks for number in range(60)])
            await session.commit()
        for job in found:
            assert (await office.final(job)).state == "done"
    assert sorted(seen) == sorted([*range(60)] * 2)


async def test_a_job_of_many_that_is_cancelled_while_they_are_still_to_be_sent_takes_no_other_with_it(
    office: Office,
) -> None:
    """Redis is slow, so that both commits wait for what was published before."""
    async with office.session_maker() as first, office.session_maker() as second:
        made = await enqueue_many(first, [call(a_task, number) for number in range(3)])
        await second.connection()
        await office.redis.client_pause(1_000, all=False)  # what writes waits
        await office.enqueue(a_task, "before")
        await first.commit()
        await cancel_job(second, made[0].id)
        await second.commit()
    await office.waiting(3, within=4)


async def test_two_who_make_jobs_with_the_same_keys_in_other_orders_are_in_nobodys_way(
    session_maker: SessionMaker, observer: Connection
) -> None:
    """A third holds the key in the middle until both have come there."""
    calls = [call(task_options(a_task, unique_key=f"{number:03}"), number) for number in range(100)]
    async with session_maker() as third, session_maker() as one, session_maker() as other:
        await enqueue(third, task_options(a_task, unique_key="050"), 50)

        async def make(session: AsyncSession, given: list[Call]) -> list[Job]:
            found = await enqueue_many(session, given)
            await session.commit()
            return found

        making = [asyncio.create_task(make(one, calls)), asyncio.create_task(make(other, calls[::-1]))]
        await eventually(lambda: waiting(observer, 2))
        await third.rollback()
        first, second = await asyncio.gather(*making)
    assert {job.id for job in first} == {job.id for job in second}
    assert await count(observer) == 100


async def waiting(observer: Connection, number: int) -> bool:
    found: int = await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    return found == number
