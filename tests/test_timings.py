"""Where the time of an answer went: a delay is found where it was, by header, log, spans and console."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from arq import Retry
from fastapi import Depends, FastAPI, Response
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

import coord.waiting.poller
from coord import (
    Coordinator,
    JobFailedError,
    WaitTimeoutError,
    create_db_dependency,
    enqueue,
    job_transaction,
    lock_tables,
    task_options,
    wait_for_row_change,
    wait_timings,
)
from coord.console import console
from coord.http import Poll, Reply, RequestLimits, poll, problem_handlers, reply
from coord.timings import AttemptTimings, wait_timings_of
from tests.desk import FULL, signed_in
from tests.models import Account, User
from tests.serving import eventually, served
from tests.shop import waiting_for_locks
from tests.waits import registered
from tests.workers import Office, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.spans import Spans

SECONDS = 0.3
CLOCK_SECONDS = 0.15
"""By which the clock of Redis may be mistaken: half of what its slowest answer took, on a busy machine."""
gate: dict[str, asyncio.Event] = {}


@pytest.fixture(autouse=True)
def no_read_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's message says where its time went: a wait that ends by a read before that does not know it."""
    monkeypatch.setattr(coord.waiting.poller, "DEFERRED_READ_SECONDS", 10.0)


async def occupy(ctx: dict[str, Any]) -> None:
    await gate["occupy"].wait()


async def rename(ctx: dict[str, Any], user_id: int, pause: float = 0.0) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [User]):
        user = await session.get_one(User, user_id)
        user.name = "done"
        await asyncio.sleep(pause)


async def fail(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx):
        raise ValueError("no such name")


async def retried(ctx: dict[str, Any], user_id: int) -> None:
    if ctx["job_try"] == 1:
        raise Retry(defer=SECONDS)
    await rename(ctx, user_id)


async def close(ctx: dict[str, Any], number: int) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [Account]):
        (await session.get_one(Account, ("eu", number))).state = "closed"


TASKS = [occupy, rename, fail]


@pytest.fixture
async def app(single: AsyncEngine, office: Office, tables: None) -> AsyncIterator[FastAPI]:
    """With a pool of one connection, which `hold` in the query takes for a while once the job is committed."""
    maker = async_sessionmaker(single, expire_on_commit=False)
    database = Depends(create_db_dependency(maker))
    app = FastAPI(exception_handlers=problem_handlers())
    app.add_middleware(RequestLimits, server_timing=True)

    @app.post("/users/{user_id}")
    async def renamed(
        user_id: int,
        answer: Annotated[Reply, Depends(reply)],
        session: AsyncSession = database,
        pause: float = 0.0,
        hold: float = 0.0,
    ) -> str:
        session.add(User(id=user_id))
        job = await enqueue(session, rename, user_id, pause)
        await session.commit()
        if hold:
            connection = await single.connect()
            asyncio.get_running_loop().call_later(hold, lambda: asyncio.ensure_future(connection.close()))
        user = await answer.row(session, User, user_id, columns=[User.name], job=job, interval=20)
        assert user is not None
        return user.name

    @app.get("/accounts/{number}")
    async def account(
        number: int, response: Response, long: Annotated[Poll, Depends(poll)], session: AsyncSession = database
    ) -> Any:
        found = await session.get_one(Account, ("eu", number))
        changed = await long.changed(session, found)
        return changed.state if changed else long.not_modified()

    app.mount("/console", console(maker, full_token=FULL))
    async with Coordinator(maker, redis=office.redis_url):
        yield app


def parts_of(header: str) -> dict[str, float]:
    """Seconds by name."""
    return {name: float(value) / 1000 for name, value in re.findall(r"(?:^|, )(\w+);dur=([\d.]+)", header)}


def blamed(parts: dict[str, float]) -> str:
    """What took the longest, if that is as long as the delay; and the rest together did not."""
    name = max(parts, key=lambda name: parts[name])
    assert parts[name] >= SECONDS - CLOCK_SECONDS, parts
    return name


async def asked(app: FastAPI, user: int = 1, **query: float) -> Any:
    async with served(app) as client:
        response = await client.post(f"/users/{user}", params=query)
    assert (response.status_code, response.json()) == (200, "done")
    return response


async def in_the_queue(app: FastAPI, office: Office, observer: asyncpg.Connection) -> Any:
    """The worker's only slot is taken."""
    gate["occupy"] = asyncio.Event()
    await office.enqueue(occupy)
    await office.waiting(0)
    asking = asyncio.create_task(asked(app))
    await asyncio.wait([asking, asyncio.create_task(office.waiting(1))], return_when="FIRST_COMPLETED")
    asyncio.get_running_loop().call_later(SECONDS, gate["occupy"].set)
    return await asking


async def held(observer: asyncpg.Connection, app: FastAPI) -> Any:
    """By a reader, whom the handler's INSERT does not wait for and the job's lock does."""
    transaction = observer.transaction()
    await transaction.start()
    await observer.execute("LOCK TABLE users IN ROW EXCLUSIVE MODE")
    asking = asyncio.create_task(asked(app))
    await eventually(lambda: waiting_for_locks(observer, "SELECT"))
    await asyncio.sleep(SECONDS)
    await transaction.rollback()
    return await asking


@pytest.mark.alone  # beside others it is not the only delay
@pytest.mark.parametrize("where", ["queue", "lock", "task", "wake"])
async def test_a_delay_is_named_as_what_it_was_by_header_log_span_and_console(
    where: str,
    app: FastAPI,
    office: Office,
    observer: asyncpg.Connection,
    spans: Spans,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "arq.coord")
    caplog.set_level(logging.DEBUG, "coord.waiting")  # last, since the handler's level is the last one
    async with working(office, TASKS, max_jobs=1):
        await asked(app, user=2)  # what is only slow at first is no delay
        spans.exporter.clear()
        caplog.clear()
        match where:
            case "queue":
                response = await in_the_queue(app, office, observer)
            case "lock":
                response = await held(observer, app)
            case "task":
                response = await asked(app, pause=SECONDS)
            case _:
                response = await asked(app, hold=SECONDS)
    header = response.headers["server-timing"]
    parts = parts_of(header)
    total = parts.pop("total")
    assert blamed(parts) == where
    assert sum(parts.values()) == pytest.approx(total, abs=CLOCK_SECONDS)
    assert "lock;dur=" in header
    assert 'desc="users in SHARE ROW EXCLUSIVE mode"' in header

    wait = spans.one("wait User").attributes
    assert wait is not None
    assert blamed({name: float(wait[f"coord.{name}_s"]) for name in parts}) == where  # type: ignore[arg-type]
    logged = [record.coord for record in caplog.records if hasattr(record, "coord")]
    (waited,) = (line for line in logged if line["event"] == "wait changed")
    assert blamed({name: waited[f"{name}_s"] for name in parts}) == where
    (ran,) = (line for line in logged if line["event"] == "job done" and line["task"] == "rename")
    assert str(ran["job"]) == spans.one("process rename").attributes["messaging.message.id"]  # type: ignore[index]
    if where != "wake":  # which the worker knows nothing of
        assert blamed({name: ran[f"{name}_s"] for name in ("queue", "lock", "task")}) == where
        process = spans.one("process rename").attributes
        assert blamed({name: float(process[f"coord.{name}_s"]) for name in ("queue", "lock", "task")}) == where  # type: ignore[index,arg-type]
    text = next(record.getMessage() for record in caplog.records if "task=rename" in record.getMessage())
    assert re.fullmatch(
        r"job done job=\S+ task=rename attempt=1 queue_s=[\d.]+ lock_s=[\d.]+ task_s=[\d.]+ "
        r'locked="users in SHARE ROW EXCLUSIVE mode" trace_id=[0-9a-f]{32}',
        text,
    )
    async with signed_in(app) as client:
        page = (await client.get(f"jobs/{ran['job']}")).text
    assert f'Most of it: <b class="part part-{where}">{where}</b>' in page


async def test_a_long_poll_says_where_the_time_of_the_change_went(app: FastAPI, office: Office) -> None:
    """It knows no job: from the bell's arrival on it counts for itself."""
    async with office.session_maker() as session:
        session.add(Account(region="eu", number=1))
        await session.commit()
    async with working(office, [close]), served(app) as client:
        asking = asyncio.create_task(client.get("/accounts/1", headers={"If-None-Match": "*", "Prefer": "wait=20"}))
        await registered(1)
        await office.enqueue(close, 1)
        response = await asking
    assert response.json() == "closed"
    assert parts_of(response.headers["server-timing"]).keys() == {"queue", "lock", "task", "wake", "total"}
    silent = FastAPI()
    silent.mount("/", app.router)
    async with served(silent) as client:
        unasked = await client.get("/accounts/1", headers={"If-None-Match": "*", "Prefer": "wait=1"})
    assert (unasked.status_code, "server-timing" in unasked.headers) == (304, False)


async def test_the_bell_carries_timings_with_a_failure_and_names_what_came_before_a_retry(
    office: Office, tables: None
) -> None:
    async with working(office, [retried, fail]), office.session_maker() as session:
        session.add(User(id=1))
        job = await enqueue(session, fail, 1)
        await session.commit()
        with pytest.raises(JobFailedError):
            await wait_for_row_change(session, User, 1, job=job, interval=20)
        failed = wait_timings(session)
        assert failed is not None
        assert (failed.job_id, failed.lock, failed.retries) == (str(job.id), 0.0, None)

        job = await enqueue(session, retried, 1)
        await session.commit()
        await wait_for_row_change(session, User, 1, job=job, interval=20)
        again = wait_timings(session)
        assert again is not None
        assert again.retries is not None
        assert again.retries >= SECONDS - CLOCK_SECONDS
        assert max(again.parts().values()) == again.retries
        assert sum(again.parts().values()) == pytest.approx(again.total, abs=0.001)


async def test_a_job_that_is_to_begin_later_has_not_waited_in_the_queue(office: Office, tables: None) -> None:
    async with working(office, [rename]), office.session_maker() as session:
        session.add(User(id=1))
        job = await enqueue(session, task_options(rename, delay=1.5), 1)
        await session.commit()
        await wait_for_row_change(session, User, 1, job=job, interval=20)
    timings = wait_timings(session)
    assert timings is not None
    assert timings.total < 1.2
    assert sum(timings.parts().values()) == pytest.approx(timings.total, abs=0.001)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b'["j",1,0,0,0]',
        b'["j",1,0,0,-1,""]',
        b'["j",1,0,0,NaN,""]',
        b'["j",1,0,0,1e999,""]',
        b'[5,1,0,0,0,""]',
        b'["j","1",0,0,0,""]',
        b'["j",1,0,0,0,7]',
        b'["j",1,[],0,0,""]',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_whoever_publishes_something_else_is_ignored(payload: bytes) -> None:
    assert AttemptTimings.read(payload) is None
    assert wait_timings_of(None, (payload, 0.0), began=0.0).parts() == {}


def test_no_name_of_a_table_ends_the_header() -> None:
    timings = AttemptTimings("j", 1, 0.0)
    timings.add_lock('or"ders\\,\r\nSet-Cookie: ü in SHARE mode', 0.3)
    header = wait_timings_of(None, (timings.payload(), 0.0), began=0.0).server_timing()
    assert 'lock;dur=300.0;desc="or?ders?,??Set-Cookie: ? in SHARE mode"' in header


async def test_a_wait_that_ends_before_its_job_is_due_has_lasted_since_the_commit(
    session_maker: async_sessionmaker[AsyncSession], tables: None, ledger: None
) -> None:
    async with Coordinator(session_maker, read_settings={}), session_maker() as session:
        session.add(User(id=1))
        job = await enqueue(session, task_options("rename", delay=3600), 1)
        await session.commit()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, 1, job=job, timeout=0.1)
        found = wait_timings(session)
    assert found is not None
    assert 0.1 <= found.total < 60
