"""A request waits for its job and is answered with the effect, or that it goes on, or why there is none."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from coord import Coordinator, JobState
from tests.counter import PROBLEM, URN, changed, counter, do, end, jobs_of, placed, runs, the_job
from tests.proxy import Proxy
from tests.serving import eventually, served
from tests.waits import registered
from worker.models import Order

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("orders", "nobody_left_waiting")

CAP = 1


@pytest.fixture(scope="module")
async def brief(session_maker: SessionMaker) -> AsyncIterator[httpx.AsyncClient]:
    """Of a counter where nobody waits longer than a second."""
    async with served(counter(session_maker, wait=CAP)) as client:
        yield client


def fulfilling(http: httpx.AsyncClient, order_id: int, prefer: str | None = None) -> asyncio.Task[httpx.Response]:
    headers = {} if prefer is None else {"Prefer": prefer}
    return asyncio.create_task(http.post(f"/orders/{order_id}/fulfil", headers=headers))


async def test_the_answer_is_the_row_once_its_job_is_done(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    asking = fulfilling(http, order_id)
    job = await the_job(session_maker)
    await registered()
    assert not asking.done()
    await do(session_maker, job)
    answer = await asking
    assert (answer.status_code, answer.json()) == (200, {"id": order_id, "status": "fulfilled"})
    assert "preference-applied" not in answer.headers


async def test_a_change_that_somebody_else_makes_is_the_answer_too(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    asking = fulfilling(http, order_id)
    await registered()
    await changed(session_maker, order_id)
    assert (await asking).json()["status"] == "fulfilled"


@pytest.mark.parametrize("state", [JobState.DONE, JobState.FAILED, None])
async def test_an_answer_leaves_no_session_to_the_garbage_collector(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int, state: JobState | None
) -> None:
    """Least of all that the job goes on, which is said when there is much to do."""
    gc.collect()
    gc.disable()
    try:
        before = sessions_alive()
        asking = fulfilling(http, order_id, None if state else "wait=0")
        job = await the_job(session_maker)
        if state:
            await registered()
            await (do(session_maker, job) if state is JobState.DONE else end(session_maker, job, state))
        assert (await asking).status_code == {JobState.DONE: 200, JobState.FAILED: 500, None: 202}[state]
        await eventually(lambda: sessions_alive() <= before)
    finally:
        gc.enable()


def sessions_alive() -> int:
    return sum(isinstance(each, AsyncSession) for each in gc.get_objects())


@pytest.mark.parametrize(
    ("prefer", "seconds", "applied"),
    [
        (None, CAP, None),
        ("wait=600", CAP, f"wait={CAP}"),
        ("wait=0", 0, "wait=0"),
        ("respond-async", 0, "respond-async"),
        ("respond-async, wait=1", 1, "wait=1, respond-async"),
        ("wait=tomorrow, foo", CAP, None),
    ],
)
async def test_when_time_is_up_the_answer_is_202_and_the_job_goes_on(
    brief: httpx.AsyncClient,
    session_maker: SessionMaker,
    prefer: str | None,
    seconds: float,
    applied: str | None,
    order_id: int,
) -> None:
    answer = await fulfilling(brief, order_id, prefer)
    job = await the_job(session_maker)
    assert answer.status_code == 202
    assert answer.json() == {"job": {"id": str(job.id), "state": "queued"}, "order": order_id}
    assert answer.headers["location"] == f"/jobs/{job.id}"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers.get("preference-applied") == applied
    assert seconds <= answer.elapsed.total_seconds() < seconds + 0.9


async def test_the_answer_says_that_the_job_runs(brief: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    asking = fulfilling(brief, await placed(session_maker))
    job = await the_job(session_maker)
    await runs(session_maker, job)
    assert (await asking).json()["job"]["state"] == "running"


async def test_a_preference_made_a_difference_only_where_there_was_a_wait(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    asking = fulfilling(http, order_id, "respond-async, wait=9")
    await registered()
    await do(session_maker, await the_job(session_maker))
    answer = await asking
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=9")


async def test_time_is_counted_from_the_arrival(database_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    order_id = await placed(maker)
    async with served(counter(maker)) as client:
        held = await engine.connect()
        asking = fulfilling(client, order_id, "wait=2")
        letting_go = asyncio.get_running_loop().call_later(1.2, lambda: asyncio.ensure_future(held.close()))
        answer = await asking
        assert letting_go.when() < asyncio.get_running_loop().time()
        assert answer.status_code == 202
        assert 2 <= answer.elapsed.total_seconds() < 3.1
    await engine.dispose()


async def test_a_failed_job_is_a_problem_with_its_reason(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    asking = fulfilling(http, await placed(session_maker))
    job = await the_job(session_maker)
    await end(session_maker, job, JobState.FAILED, "OutOfTea: none is left")
    answer = await asking
    assert (answer.status_code, answer.headers["content-type"]) == (500, PROBLEM)
    assert answer.json() == {
        "type": f"{URN}job-failed",
        "title": "Job failed",
        "status": 500,
        "detail": "OutOfTea: none is left",
        "job": str(job.id),
    }


async def test_a_cancelled_job_is_a_conflict(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    asking = fulfilling(http, await placed(session_maker))
    job = await the_job(session_maker)
    await end(session_maker, job, JobState.CANCELLED)
    answer = await asking
    assert (answer.status_code, answer.json()["type"], answer.json()["job"]) == (
        409,
        f"{URN}job-cancelled",
        str(job.id),
    )


async def test_a_row_that_is_deleted_meanwhile_is_a_404(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    asking = fulfilling(http, order_id)
    await registered()
    async with session_maker() as session, session.begin():
        await session.execute(delete(Order).where(Order.id == order_id))
    answer = await asking
    assert (answer.status_code, answer.json()["type"]) == (404, f"{URN}not-found")
    assert "Order(" not in answer.text


async def test_one_wait_too_many_is_a_503_and_its_job_is_kept(
    http: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    async with Coordinator(session_maker, max_waiters=1):
        polled = f"/orders/{await placed(session_maker)}"
        polling = asyncio.create_task(http.get(polled, headers={"If-None-Match": "*", "Prefer": "wait=20"}))
        await registered()
        order_id = await placed(session_maker)
        refused = await fulfilling(http, order_id)
        assert (refused.status_code, refused.json()["type"]) == (503, f"{URN}too-many-waiters")
        assert int(refused.headers["retry-after"]) >= 1
        await do(session_maker, await the_job(session_maker))
        await changed(session_maker, int(polled.removeprefix("/orders/")))
        assert (await polling).status_code == 200


async def test_headers_set_by_the_handler_are_sent_with_every_answer(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    accepted = await fulfilling(http, order_id, "wait=0")
    await do(session_maker, await the_job(session_maker))
    answers: list[Any] = [accepted, await http.get(f"/orders/{order_id}")]
    answers.append(await http.get(f"/orders/{order_id}", headers={"If-None-Match": "*"}))
    assert [answer.status_code for answer in answers] == [202, 200, 304]
    assert [answer.headers["x-counter"] for answer in answers] == ["3"] * 3


async def test_a_pool_of_one_serves_all_who_wait(database_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    async with served(counter(maker)) as client:
        asking = [fulfilling(client, await placed(maker)) for _ in range(30)]
        while len(await jobs_of(maker)) < len(asking):
            await registered()
        for job in await jobs_of(maker):
            await do(maker, job)
        answers = await asyncio.gather(*asking)
    assert {answer.status_code for answer in answers} == {200}
    await engine.dispose()


async def test_a_202_has_the_last_known_state_when_the_job_cannot_be_read_in_time(database_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    async with served(counter(maker)) as client:
        asking = fulfilling(client, await placed(maker), "wait=1")
        job = await the_job(maker)
        await registered()
        async with engine.connect():  # all that the pool has
            answer = await asking
        assert (answer.status_code, answer.json()["job"]) == (202, {"id": str(job.id), "state": "queued"})
        assert answer.elapsed.total_seconds() < 3
        assert (await fulfilling(client, await placed(maker), "wait=0")).status_code == 202
    await engine.dispose()


async def test_a_202_comes_in_time_though_postgresql_has_fallen_silent(database_url: str) -> None:
    """It does not have to hang up politely first."""
    async with Proxy(database_url).opened() as way:
        engine = create_async_engine(way.url)
        maker = async_sessionmaker(engine, expire_on_commit=False)
        async with served(counter(maker)) as client:
            asking = fulfilling(client, await placed(maker), "wait=1")
            job = await the_job(maker)
            await registered()
            way.flows.clear()
            try:
                answer = await asking
            finally:
                way.flows.set()
        await engine.dispose()
    assert (answer.status_code, answer.json().get("job")) == (202, {"id": str(job.id), "state": "queued"})
    assert answer.elapsed.total_seconds() < 3
