"""Many jobs cancelled or run again by what they are: some at a time, never waiting for one that runs, and counted."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from coord import Job, call, cancel_jobs, enqueue_many, job_transaction, retry_jobs, task_options
from tests.ledger import a_task, committed, delivered
from tests.serving import eventually
from tests.workers import Office, working

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")


async def another_task(ctx: Any, *args: Any) -> None:
    """Never run."""


async def several(session_maker: SessionMaker, task: Any, count: int) -> list[Job]:
    async with session_maker() as session:
        made = await enqueue_many(session, [call(task, number) for number in range(count)])
        await session.commit()
    return made


async def age(observer: Connection, found: list[Job], seconds: float) -> None:
    ids = [job.id for job in found]
    await observer.execute(
        "UPDATE coord_jobs SET created_at = now() - $2::interval WHERE id = ANY ($1)", ids, timedelta(seconds=seconds)
    )


async def states(observer: Connection) -> dict[str, int]:
    found = await observer.fetch("SELECT state, count(*) FROM coord_jobs GROUP BY 1")
    return {row["state"]: row["count"] for row in found}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 9),
        ({"state": "queued"}, 9),
        ({"state": "running"}, 0),
        ({"task": "another_task"}, 2),
        ({"queue": "other"}, 3),
        ({"older_than": 60}, 3),
        ({"newer_than": 60}, 6),
        ({"queue": "other", "task": "another_task"}, 0),
        ({"task": "another_task", "older_than": 1, "state": "queued"}, 0),
    ],
)
async def test_jobs_are_cancelled_by_what_they_are(
    session_maker: SessionMaker, observer: Connection, options: dict[str, Any], expected: int
) -> None:
    await age(observer, await several(session_maker, task_options(a_task, queue="other"), 3), 3600)
    await several(session_maker, a_task, 4)
    await several(session_maker, another_task, 2)
    async with session_maker() as session:
        assert await cancel_jobs(session, **options) == expected
        assert (await states(observer)).get("cancelled", 0) == 0
        await session.commit()
        assert await cancel_jobs(session, **options) == 0
    assert (await states(observer)).get("cancelled", 0) == expected


async def test_a_crowd_is_cancelled_in_batches_the_eldest_first(
    session_maker: SessionMaker, observer: Connection
) -> None:
    made = await several(session_maker, a_task, 25)
    counts = []
    async with session_maker() as session:
        while count := await cancel_jobs(session, limit=10):
            counts.append(count)
            await session.commit()
            left = await observer.fetch("SELECT id FROM coord_jobs WHERE state = 'queued' ORDER BY id")
            assert [row["id"] for row in left] == [job.id for job in made[sum(counts) :]]
    assert counts == [10, 10, 5]


async def test_what_runs_is_not_waited_for_and_its_worker_is_told_once(
    session_maker: SessionMaker, observer: Connection
) -> None:
    running, *_ = await several(session_maker, a_task, 3)
    async with job_transaction(delivered(running, session_maker)), session_maker() as session:
        async with asyncio.timeout(5):
            assert await cancel_jobs(session) == 3
        await session.commit()
        assert await cancel_jobs(session) == 0
        assert await observer.fetchval("SELECT job_id FROM coord_cancellations") == running.id
    assert await states(observer) == {"done": 1, "cancelled": 2}


@pytest.mark.parametrize("state", ["running", None])
async def test_jobs_that_run_are_cancelled_and_leave_the_feed(office: Office, state: str | None) -> None:
    begun: list[int] = []

    async def task(ctx: dict[str, Any], number: int) -> None:
        begun.append(number)
        await asyncio.Event().wait()

    async with working(office, [task], max_jobs=2):
        made = await several(office.session_maker, task, 4)
        await eventually(lambda: len(begun) == 2)
        async with office.session_maker() as session:

            async def named() -> bool:
                return sum([len(worker.jobs) for worker in await office.workers()]) == 2

            await eventually(named)
            assert await cancel_jobs(session, state=state) == (2 if state else 4)
            await session.commit()
        ended = [await office.final(job) for job in (made[:2] if state else made)]
        assert {row.state for row in ended} == {"cancelled"}
        if state:
            await eventually(lambda: sorted(begun) == [0, 1, 2, 3])
    assert len(begun) == (4 if state else 2)


@pytest.mark.parametrize(
    "refused",
    [
        {"state": "done"},
        {"state": "nonsense"},
        {"limit": 0},
        {"older_than": -1},
        {"older_than": 10**13},
        {"newer_than": 1e299},
        {"task": "a\0b"},
        {"queue": "\ud800"},
    ],
)
async def test_what_makes_no_sense_is_refused(session_maker: SessionMaker, refused: dict[str, Any]) -> None:
    async with session_maker() as session:
        for function in (cancel_jobs, retry_jobs):
            with pytest.raises(ValueError, match=r"only what|is not a valid|limit|er_than|is a text of"):
                await function(session, **refused)
        with pytest.raises(ValueError, match="only what has failed"):
            await retry_jobs(session, state="queued")


async def end(observer: Connection, state: str, *ended: Job) -> None:
    ids = [job.id for job in ended]
    await observer.execute("UPDATE coord_jobs SET state = $1, finished_at = now() WHERE id = ANY ($2)", state, ids)


async def test_jobs_run_again_by_what_they_are_with_an_attempt_more(
    session_maker: SessionMaker, observer: Connection
) -> None:
    made = await several(session_maker, task_options(a_task, max_attempts=1), 6)
    await end(observer, "failed", *made[:3])
    await end(observer, "cancelled", made[3])
    await end(observer, "done", made[4])
    async with session_maker() as session:
        assert await retry_jobs(session, state="failed", limit=2) == 2
        assert await retry_jobs(session, task="another_task") == 0
        assert await retry_jobs(session) == 2
        await session.commit()
    rows = await observer.fetch("SELECT id, state, attempt, max_attempts FROM coord_jobs ORDER BY id")
    assert [tuple(row)[1:] for row in rows] == [("queued", 2, 2)] * 4 + [("done", 1, 1), ("queued", 1, 1)]


async def test_of_jobs_with_one_unique_key_the_newest_runs_again_and_none_beside_an_unfinished_one(
    session_maker: SessionMaker, observer: Connection
) -> None:
    made = []
    for key in ("a", "a", "b", "b"):
        made.append(await committed(session_maker, task_options(a_task, unique_key=key), 1))
        if len(made) < 4:
            await end(observer, "failed", made[-1])
    async with session_maker() as session:
        assert await retry_jobs(session) == 1
        await session.commit()
        assert await retry_jobs(session) == 0
    queued = await observer.fetch("SELECT id FROM coord_jobs WHERE state = 'queued' ORDER BY id")
    assert [row["id"] for row in queued] == [made[1].id, made[3].id]


async def test_jobs_that_run_again_are_handed_over(office: Office) -> None:
    ran: list[int] = []

    async def task(ctx: dict[str, Any], number: int) -> None:
        if ctx["job_try"] == 1:
            raise ValueError("not yet")
        ran.append(number)

    async with working(office, [task]):
        made = await several(office.session_maker, task, 5)
        for job in made:
            assert (await office.final(job)).state == "failed"
        async with office.session_maker() as session:
            assert await retry_jobs(session, state="failed", task="task") in (0, 5)
            assert await retry_jobs(session, state="failed") in (0, 5)
            await session.commit()
        for job in made:
            assert (await office.final(job)).state == "done"
    assert sorted(ran) == [0, 1, 2, 3, 4]
