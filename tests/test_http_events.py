"""Event streams: the state now, then the newest after each change, resumed where they were left, bounded, and ended."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fastapi.routing
import pytest
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

import coord.http.events
from coord import Coordinator, Job, JobState, wait_for_row_change
from coord.http import EventStreams, JobStatus
from coord.http.events import RunningJobs
from tests.counter import PROBLEM, URN, changed, counter, end, placed, runs
from tests.ledger import a_task, committed, statements
from tests.proxy import Proxy
from tests.raw import Call, call
from tests.serving import eventually, served
from tests.shop import waiting_for_locks
from tests.waits import open_waits, registered
from worker.models import Order, OrderStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg
    import httpx
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("orders", "nobody_follows")


@pytest.fixture
async def nobody_follows(nobody_left_waiting: None) -> AsyncIterator[None]:
    """Streams that a test has left have ended within a second."""
    yield
    await eventually(lambda: not open_waits(), within=1)


@contextlib.asynccontextmanager
async def following(http: httpx.AsyncClient, order_id: int, last: str | None = None) -> AsyncIterator[Call]:
    headers = {} if last is None else {"Last-Event-ID": last}
    async with call(str(http.base_url), "GET", f"/orders/{order_id}/events", headers) as stream:
        yield await stream.begun()


async def states(stream: Call, count: int) -> list[tuple[str, str]]:
    """The ids and states of the next events."""
    events = [await stream.event() for _ in range(count)]
    return [(event.id, event.data["status"]) for event in events if event is not None]


async def test_a_stream_is_the_state_now_then_the_newest_after_each_change(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    async with following(http, order_id) as stream:
        assert stream.status == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert (stream.headers["cache-control"], stream.headers["x-accel-buffering"]) == ("no-cache", "no")
        assert await states(stream, 1) == [("1", "pending")]
        await changed(session_maker, order_id)
        assert await states(stream, 1) == [("2", "fulfilled")]
        await changed(session_maker, order_id, OrderStatus.REJECTED)
        assert await states(stream, 2) == [("3", "rejected")]


async def test_a_change_between_reading_the_row_and_the_stream_is_sent(
    http: httpx.AsyncClient, session_maker: SessionMaker, redis_url: str, order_id: int
) -> None:
    async with Coordinator(session_maker, redis=redis_url):
        for number in range(2, 12):
            async with following(http, order_id) as stream:
                await changed(session_maker, order_id)
                seen = [0]
                while seen[-1] < number:
                    ((id, _),) = await states(stream, 1)
                    seen.append(int(id))
                assert seen == sorted({*seen})
        await eventually(lambda: not open_waits(), within=1)


async def test_last_event_id_resumes(http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int) -> None:
    async with following(http, order_id, "1") as stream:
        await registered()
        await changed(session_maker, order_id)
        assert await states(stream, 1) == [("2", "fulfilled")]
    async with following(http, order_id, "1") as stream:
        assert await states(stream, 1) == [("2", "fulfilled")]


@pytest.mark.parametrize("last", ["0", "7", "", "one", '"1"', "1.0", "é"])
async def test_an_unknown_last_event_id_gets_the_newest_state(
    http: httpx.AsyncClient, session_maker: SessionMaker, last: str
) -> None:
    async with following(http, await placed(session_maker), last) as stream:
        assert await states(stream, 1) == [("1", "pending")]


async def test_a_missing_row_is_a_404_before_the_stream_begins(http: httpx.AsyncClient) -> None:
    for path, status in (("/orders/1/events", 404), ("/orders/x/events", 422)):
        answer = await http.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)


async def test_a_stream_ends_when_its_row_goes(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    async with following(http, order_id) as stream:
        await states(stream, 1)
        await registered()
        async with session_maker() as session, session.begin():
            await session.execute(delete(Order))
        assert await stream.event() is None


async def test_an_idle_stream_is_kept_alive_by_comments(
    http: httpx.AsyncClient, session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.05)
    async with following(http, await placed(session_maker), "1") as stream:
        assert [await stream.text(within=2) for _ in range(3)] == [": ping\n\n"] * 3


async def test_head_does_not_begin_a_stream(http: httpx.AsyncClient, order_id: int) -> None:
    answer = await http.head(f"/orders/{order_id}/events")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (await http.head(f"/orders/{order_id + 1}/events")).status_code == 404


async def test_one_stream_too_many_is_refused_for_now(session_maker: SessionMaker, order_id: int) -> None:
    async with served(counter(session_maker, streams=EventStreams(session_maker, max_streams=2))) as http:
        async with following(http, order_id) as first:
            async with following(http, order_id):
                refused = await http.get(f"/orders/{order_id}/events")
                assert (refused.status_code, refused.json()["type"]) == (503, f"{URN}too-many-waiters")
                assert int(refused.headers["retry-after"]) >= 1
                assert (await http.get(f"/orders/{order_id}")).status_code == 200

            async def there_is_room() -> bool:
                async with following(http, order_id) as next_one:
                    return next_one.status == 200

            await eventually(there_is_room, within=1)
            assert await states(first, 1) == [("1", "pending")]


async def test_a_stream_that_would_be_one_wait_too_many_is_refused_before_it_begins(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    async with Coordinator(session_maker, max_waiters=1), following(http, order_id) as stream:
        refused = await http.get(f"/orders/{order_id}/events")
        assert (refused.status_code, refused.json()["type"]) == (503, f"{URN}too-many-waiters")
        assert await states(stream, 1) == [("1", "pending")]


@pytest.mark.parametrize("duration", [0.3, 1])
async def test_a_stream_ends_after_its_time_and_is_resumed_without_a_gap(
    session_maker: SessionMaker, duration: float
) -> None:
    order_id, seen = await placed(session_maker), ["0"]
    streams = EventStreams(session_maker, duration=duration)
    async with served(counter(session_maker, streams=streams)) as http:
        for _ in range(3):
            async with following(http, order_id, seen[-1]) as stream:
                while (event := await stream.event(within=duration + 3)) is not None:
                    seen.append(event.id)
            await changed(session_maker, order_id)
    assert seen == ["0", "1", "2", "3"]


def test_a_stream_of_negative_length_is_refused(session_maker: SessionMaker) -> None:
    with pytest.raises(ValueError, match="duration"):
        EventStreams(session_maker, duration=-1)


async def test_a_finished_stream_is_204_to_a_client_with_its_last_event(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    """After which a browser asks no more."""
    await changed(session_maker, order_id, OrderStatus.REJECTED)
    async with following(http, order_id, "1") as stream:
        assert await states(stream, 2) == [("2", "rejected")]
    async with following(http, order_id, "2") as stream:
        assert (stream.status, stream.headers.get("content-length", "0")) == (204, "0")


@pytest.mark.parametrize("state", [JobState.DONE, JobState.FAILED, JobState.CANCELLED])
async def test_a_finished_jobs_stream_is_204_to_a_client_with_its_last_event(
    http: httpx.AsyncClient, session_maker: SessionMaker, state: JobState
) -> None:
    job = await committed(session_maker, a_task)
    await end(session_maker, job, state)
    for last in ("", "1-queued", "1-running"):
        async with call(str(http.base_url), "GET", f"/jobs/{job.id}/events", {"Last-Event-ID": last}) as stream:
            assert (await stream.begun()).status == 200
            assert await job_states(stream, 2) == [(f"1-{state}", state)]
    answer = await http.get(f"/jobs/{job.id}/events", headers={"Last-Event-ID": f"1-{state}"})
    assert (answer.status_code, answer.content) == (204, b"")


async def test_a_stream_of_a_job_follows_its_states_until_it_has_ended(
    http: httpx.AsyncClient, session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it runs is nothing that the ledger says, but the heartbeat of its worker."""
    monkeypatch.setattr(coord.http.events, "HEARTBEAT_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(coord.http.events, "MAX_AGE_SECONDS", 0.05)
    job = await committed(session_maker, a_task)
    async with call(str(http.base_url), "GET", f"/jobs/{job.id}/events") as stream:
        await stream.begun()
        assert await job_states(stream, 1) == [("1-queued", "queued")]
        await runs(session_maker, job)
        assert await job_states(stream, 1) == [("1-running", "running")]
        async with call(str(http.base_url), "GET", f"/jobs/{job.id}/events", {"Last-Event-ID": "1-queued"}) as another:
            await another.begun()
            assert await job_states(another, 1) == [("1-running", "running")]
            await end(session_maker, job, JobState.FAILED, "OutOfTea")
            assert await job_states(another, 2) == await job_states(stream, 2) == [("1-failed", "failed")]
    async with call(str(http.base_url), "GET", f"/jobs/{job.id}/events") as late:
        await late.begun()
        assert await job_states(late, 2) == [("1-failed", "failed")]


async def test_a_job_that_ends_while_the_heartbeats_are_read_is_reported_as_ended(
    http: httpx.AsyncClient, session_maker: SessionMaker, observer: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session's own instance is brought up to date in place, whoever holds it."""
    monkeypatch.setattr(coord.http.events, "HEARTBEAT_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(coord.http.events, "MAX_AGE_SECONDS", 0.01)
    job = await committed(session_maker, a_task)
    async with call(str(http.base_url), "GET", f"/jobs/{job.id}/events") as stream:
        await stream.begun()
        assert await job_states(stream, 1) == [("1-queued", "queued")]
        async with observer.transaction():
            await observer.execute("LOCK TABLE coord_workers IN ACCESS EXCLUSIVE MODE")
            await eventually(lambda: waiting_for_locks(observer, "SELECT coord_workers"))
            async with session_maker() as session:
                seen = asyncio.create_task(wait_for_row_change(session, Job, job.id, since={"state": "queued"}))
                await registered(2)
                await end(session_maker, job, JobState.FAILED, "OutOfTea")
                await seen  # by the stream too, whose place among those who wait is before this one's
        assert await job_states(stream, 2) == [("1-failed", "failed")]


async def job_states(stream: Call, count: int) -> list[tuple[str, str]]:
    events = [await stream.event() for _ in range(count)]
    return [(event.id, event.data["state"]) for event in events if event is not None]


async def test_a_hundred_streams_of_jobs_share_one_read_of_the_heartbeats(
    session_maker: SessionMaker, engine: AsyncEngine
) -> None:
    jobs = [await committed(session_maker, a_task) for _ in range(100)]
    running = RunningJobs(session_maker)
    async with statements(engine) as seen:
        assert {status.state for status in await asyncio.gather(*map(running.status_of, jobs))} == {"queued"}
    assert len([statement for statement in seen if "coord_workers" in statement]) == 1


def test_streams_may_be_served_by_one_event_loop_after_another() -> None:
    """As by the tests of an application whose module makes its `EventStreams`."""
    away = create_async_engine("postgresql+asyncpg://127.0.0.1:1/nowhere", poolclass=NullPool)
    running = RunningJobs(async_sessionmaker(away))
    job = Job(id=uuid4(), task="send", state=JobState.QUEUED, attempt=1, error=None)

    async def two() -> tuple[JobStatus, JobStatus]:
        running._expires = 0.0
        return await asyncio.gather(running.status_of(job), running.status_of(job))

    for _ in range(2):
        assert [status.state for status in asyncio.run(two())] == [JobState.QUEUED] * 2


async def test_a_job_is_reported_while_the_heartbeats_cannot_be_read(session_maker: SessionMaker) -> None:
    job = await committed(session_maker, a_task)
    away = create_async_engine("postgresql+asyncpg://127.0.0.1:1/nowhere")
    assert (await RunningJobs(async_sessionmaker(away)).status_of(job)).state is JobState.QUEUED


async def test_rows_of_a_session_that_expires_them_are_streamed_too(database_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    maker = async_sessionmaker(engine)
    async with maker() as session, session.begin():
        session.add(order := Order(sku="tea", quantity=1))
        await session.flush()
        order_id = order.id
    async with served(counter(maker)) as http:
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(following(http, order_id)) for _ in range(9)]
            assert [await states(stream, 1) for stream in streams] == [[("1", "pending")]] * 9
            await changed(maker, order_id)
            assert [await states(stream, 1) for stream in streams] == [[("2", "fulfilled")]] * 9
    await engine.dispose()


async def test_a_client_that_does_not_read_delays_no_other_stream(
    http: httpx.AsyncClient, session_maker: SessionMaker, redis_url: str, order_id: int
) -> None:
    async with Coordinator(session_maker, redis=redis_url):
        async with following(http, order_id) as idle, following(http, order_id) as stream:
            await states(stream, 1)
            for number in range(2, 30):
                await changed(session_maker, order_id)
                assert await states(stream, 1) == [(str(number), "fulfilled")]
            last = ""
            while last != "29":
                ((last, _),) = await states(idle, 1)
        await eventually(lambda: not open_waits(), within=1)


async def test_a_stream_of_a_job_ends_after_its_time_though_postgresql_has_fallen_silent(
    session_maker: SessionMaker, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.http.events, "HEARTBEAT_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(coord.http.events, "MAX_AGE_SECONDS", 0.05)
    job = await committed(session_maker, a_task)
    async with Proxy(database_url).opened() as way:
        engine = create_async_engine(way.url)
        maker = async_sessionmaker(engine, expire_on_commit=False)
        async with served(counter(maker, streams=EventStreams(maker, duration=1))) as http:
            async with call(str(http.base_url), "GET", f"/jobs/{job.id}/events") as stream:
                await stream.begun()
                assert await job_states(stream, 1) == [("1-queued", "queued")]
                way.flows.clear()
                try:
                    async with asyncio.timeout(5):
                        assert await stream.event() is None
                finally:
                    way.flows.set()
        await engine.dispose()


async def of_a_row(_row: Order) -> str:
    return ""


@pytest.mark.parametrize("given", [{"id": of_a_row}, {"id": str, "is_final": of_a_row}])
def test_an_asynchronous_id_or_is_final_is_refused(session_maker: SessionMaker, given: Any) -> None:
    """A coroutine is true, so that each stream would end with its first state."""
    with pytest.raises(TypeError, match="plain functions"):
        EventStreams(session_maker).of(lambda: None, **given)
