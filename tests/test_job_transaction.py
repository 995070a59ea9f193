"""The job's transaction: its effect and its completion are one commit, of the one attempt that may apply it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord import (
    Job,
    JobSuperseded,
    create_db_context,
    get_transaction,
    job_transaction,
    lock_tables,
    set_result,
    task_options,
)
from coord.jobs.attempt import ATTEMPT
from coord.jobs.job_transaction import WORKER_LOCK_CLASS
from coord.retryable import is_retryable
from tests.ledger import WORKER_LOCK, a_task, committed, delivered, statements
from tests.models import Item, User
from tests.proxy import Proxy
from tests.serving import engine_at, eventually
from tests.shop import waiting_for_locks

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")

SETTINGS = ("client_connection_check_interval", "idle_in_transaction_session_timeout")


async def state(observer: Connection) -> str:
    found: str = await observer.fetchval("SELECT state FROM coord_jobs")
    return found


async def users(observer: Connection) -> int:
    found: int = await observer.fetchval("SELECT count(*) FROM users")
    return found


async def apply(ctx: dict[str, Any], user_id: int = 1) -> None:
    """The effect: a user."""
    async with job_transaction(ctx) as session:
        session.add(User(id=user_id))


# One commit


async def test_the_effect_and_the_completion_are_one_commit(session_maker: SessionMaker, observer: Connection) -> None:
    job = await committed(session_maker)
    ctx = delivered(job, session_maker)
    async with job_transaction(ctx) as session:
        session.add(User(id=1))
        await session.flush()
        assert (await state(observer), await users(observer)) == ("queued", 0)
        assert not ctx[ATTEMPT].applied
    assert (await state(observer), await users(observer)) == ("done", 1)
    assert ctx[ATTEMPT].applied
    row = await observer.fetchrow("SELECT started_at, finished_at, attempt, result FROM coord_jobs")
    assert row["started_at"] == ctx[ATTEMPT].began
    assert row["finished_at"] is not None
    assert (row["attempt"], row["result"]) == (1, None)


async def test_an_effect_that_fails_leaves_the_job_queued(session_maker: SessionMaker, observer: Connection) -> None:
    job = await committed(session_maker)
    ctx = delivered(job, session_maker)
    with pytest.raises(ZeroDivisionError):
        async with job_transaction(ctx) as session:
            session.add(User(id=1))
            await session.flush()
            raise ZeroDivisionError
    assert (await state(observer), await users(observer)) == ("queued", 0)
    assert not ctx[ATTEMPT].applied
    await apply(delivered(job, session_maker))
    assert (await state(observer), await users(observer)) == ("done", 1)


async def test_a_commit_that_fails_leaves_the_job_queued(session_maker: SessionMaker, observer: Connection) -> None:
    job = await committed(session_maker)
    ctx = delivered(job, session_maker)
    with pytest.raises(IntegrityError):
        async with job_transaction(ctx) as session:
            session.add(Item(id=1, user_id=404))  # a deferred foreign key
    assert (await state(observer), ctx[ATTEMPT].applied) == ("queued", False)


async def test_an_error_that_the_task_swallows_is_no_success(session_maker: SessionMaker, observer: Connection) -> None:
    """PostgreSQL answers the COMMIT of a failed transaction with a ROLLBACK, and with no error."""
    create_db_context(session_maker)  # as a worker does
    job = await committed(session_maker)
    ctx = delivered(job, session_maker)
    with pytest.raises(InvalidRequestError, match="applied nothing") as caught:
        async with job_transaction(ctx) as session:
            session.add(User(id=1))
            await session.flush()
            with contextlib.suppress(DBAPIError):
                await session.execute(text("SELECT 1/0"))
    assert "division by zero" in str(caught.value.__cause__)
    assert (await state(observer), await users(observer), ctx[ATTEMPT].applied) == ("queued", 0, False)


async def test_a_commit_that_fails_speaks_for_itself_whatever_a_savepoint_has_contained(
    session_maker: SessionMaker, observer: Connection
) -> None:
    """It may be worth another attempt, which what was handled before is not."""
    create_db_context(session_maker)
    job = await committed(session_maker)
    with pytest.raises(IntegrityError):
        async with job_transaction(delivered(job, session_maker)) as session:
            with contextlib.suppress(DBAPIError):
                async with get_transaction(session):
                    await session.execute(text("SELECT 1/0"))
            session.add(Item(id=1, user_id=404))  # a deferred foreign key
    assert await state(observer) == "queued"


async def test_a_job_that_was_cancelled_before_it_began_applies_nothing(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    """Also where only the wish is known: its row was locked by somebody who did not run it."""
    await observer.execute("INSERT INTO coord_cancellations (job_id) VALUES ($1)", job.id)
    with pytest.raises(JobSuperseded):
        await apply(delivered(job, session_maker))
    assert (await state(observer), await users(observer)) == ("queued", 0)


async def test_a_savepoint_inside_rolls_back_alone(session_maker: SessionMaker, observer: Connection, job: Job) -> None:
    async with job_transaction(delivered(job, session_maker)) as session:
        session.add(User(id=1))
        with pytest.raises(ZeroDivisionError):
            async with get_transaction(session):
                session.add(User(id=2))
                raise ZeroDivisionError
    assert (await state(observer), await users(observer)) == ("done", 1)


async def test_the_result_is_kept_with_the_effect(session_maker: SessionMaker, observer: Connection, job: Job) -> None:
    for value in ({"invoice": 7}, None):
        with contextlib.suppress(ZeroDivisionError):
            async with job_transaction(delivered(job, session_maker)) as session:
                await set_result(session, "first")
                await set_result(session, value)
                if value:
                    raise ZeroDivisionError
    assert await state(observer) == "done"
    assert await observer.fetchval("SELECT result FROM coord_jobs") == "null"


@pytest.mark.parametrize("value", [(1,), {1: 2}, float("nan"), object(), b""])
async def test_a_result_that_json_would_change_is_refused_and_costs_nothing(
    session_maker: SessionMaker, observer: Connection, value: Any, job: Job
) -> None:
    async with job_transaction(delivered(job, session_maker)) as session:
        with pytest.raises(TypeError, match="the result"):
            await set_result(session, value)
        session.add(User(id=1))
    assert (await state(observer), await users(observer)) == ("done", 1)


async def test_a_result_belongs_to_an_open_job_transaction(session_maker: SessionMaker, engine: AsyncEngine) -> None:
    job = await committed(session_maker)
    async with session_maker() as session:
        with pytest.raises(RuntimeError, match="job_transaction"):
            await set_result(session, 1)
        assert not session.in_transaction()
    async with job_transaction(delivered(job, session_maker)) as session:
        pass
    with pytest.raises(RuntimeError, match="job_transaction"):
        await set_result(session, 1)
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# The fence


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": 2},
        {"attempt": 0},
        {"args": [6]},
        {"args": ["5"]},
        {"args": [5.0]},
        {"args": [5, None]},
        {"args": []},
        {"kwargs": {"fast": False}},
        {"kwargs": {}},
        {"task": "another"},
        {"timeout": 60.0},
        {"timeout": None},
        {"job_id": UUID(int=7)},
    ],
    ids=str,
)
async def test_an_attempt_that_differs_from_the_ledger_is_superseded_at_entry(
    session_maker: SessionMaker, observer: Connection, engine: AsyncEngine, change: dict[str, Any]
) -> None:
    job = await committed(session_maker, task_options(a_task, timeout=30), 5, fast=True)
    entered = False
    with pytest.raises(JobSuperseded, match=str(change.get("job_id", job.id))):
        async with job_transaction(delivered(job, session_maker, **change)):
            entered = True
    assert not entered
    assert await state(observer) == "queued"
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await apply(delivered(job, session_maker))
    assert await state(observer) == "done"


@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "pruned"])
async def test_a_job_that_has_ended_is_superseded_at_entry(
    session_maker: SessionMaker, observer: Connection, end: str, job: Job
) -> None:
    if end == "pruned":
        await observer.execute("DELETE FROM coord_jobs")
    else:
        await observer.execute("UPDATE coord_jobs SET state = $1", end)
    with pytest.raises(JobSuperseded):
        await apply(delivered(job, session_maker))
    assert await users(observer) == 0


async def test_except_exception_does_not_catch_job_superseded(session_maker: SessionMaker, job: Job) -> None:
    ctx = delivered(job, session_maker, attempt=9)
    went_on = False
    with pytest.raises(JobSuperseded):
        with contextlib.suppress(Exception):
            await apply(ctx)
        went_on = True
    assert not went_on


async def test_of_two_deliveries_at_once_one_applies_its_effect(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    async with job_transaction(delivered(job, session_maker)) as session:
        second = asyncio.create_task(apply(delivered(job, session_maker), 2))
        await eventually(lambda: waiting_for_locks(observer, "UPDATE coord_jobs"))
        session.add(User(id=1))
    with pytest.raises(JobSuperseded):
        await second
    assert await observer.fetch("SELECT id FROM users") == [(1,)]


async def test_the_second_of_two_deliveries_applies_it_if_the_first_rolls_back(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with job_transaction(delivered(job, session_maker)) as session:
            session.add(User(id=1))
            await session.flush()
            second = asyncio.create_task(apply(delivered(job, session_maker), 2))
            await eventually(lambda: waiting_for_locks(observer, "UPDATE coord_jobs"))
            raise ZeroDivisionError
    await second
    assert await observer.fetch("SELECT id FROM users") == [(2,)]


async def test_a_hundred_deliveries_at_once_apply_one_effect(session_maker: SessionMaker, observer: Connection) -> None:
    job = await committed(session_maker)
    deliveries = [apply(delivered(job, session_maker), n) for n in range(100)]
    outcomes = await asyncio.gather(*deliveries, return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 1
    assert sum(isinstance(outcome, JobSuperseded) for outcome in outcomes) == 99
    assert await users(observer) == 1


async def test_an_attempt_has_one_block(session_maker: SessionMaker, observer: Connection, job: Job) -> None:
    ctx = delivered(job, session_maker)
    await apply(ctx, 1)
    with pytest.raises(RuntimeError, match="one job_transaction"):
        await apply(ctx, 2)
    assert await users(observer) == 1
    other = delivered(await committed(session_maker), session_maker)
    async with job_transaction(other):
        with pytest.raises(RuntimeError, match="one job_transaction"):
            await apply(other, 2)
    failing = delivered(await committed(session_maker), session_maker)
    for expected in (ZeroDivisionError, RuntimeError):
        with pytest.raises(expected):
            async with job_transaction(failing):
                raise ZeroDivisionError


@pytest.mark.parametrize("ctx", [{}, {ATTEMPT: None}, {"job_id": "abc", "redis": None}])
async def test_a_task_that_no_worker_settings_run_has_no_job_transaction(ctx: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="worker_settings"):
        await apply(ctx)


# What a task may do to its session


async def test_a_commit_inside_the_block_commits_effect_and_completion_and_ends_it(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    with pytest.raises(InvalidRequestError):
        async with job_transaction(delivered(job, session_maker)) as session:
            session.add(User(id=1))
            await session.commit()
            assert (await state(observer), await users(observer)) == ("done", 1)
            session.add(User(id=2))
            await session.flush()
    assert (await state(observer), await users(observer)) == ("done", 1)


async def test_a_commit_at_the_end_of_the_block_does_no_harm(session_maker: SessionMaker, observer: Connection) -> None:
    job = await committed(session_maker)
    ctx = delivered(job, session_maker)
    async with job_transaction(ctx) as session:
        session.add(User(id=1))
        await session.commit()
    assert (await state(observer), await users(observer), ctx[ATTEMPT].applied) == ("done", 1, True)


@pytest.mark.parametrize("end", ["rollback", "close", "flush"])
async def test_a_block_that_has_applied_nothing_is_an_error(
    session_maker: SessionMaker, observer: Connection, end: str
) -> None:
    """SQLAlchemy leaves it in silence, and the worker would mark the job done."""
    await observer.execute("INSERT INTO users VALUES (1, '')")
    job = await committed(session_maker)
    ctx = delivered(job, session_maker)
    with pytest.raises(InvalidRequestError, match="applied nothing") as caught:
        async with job_transaction(ctx) as session:
            async with get_transaction(session):
                session.add(User(id=2))
            if end == "flush":
                session.add(User(id=1))
                with contextlib.suppress(IntegrityError):
                    await session.flush()
            else:
                await getattr(session, end)()
    assert (await state(observer), await users(observer), ctx[ATTEMPT].applied) == ("queued", 1, False)
    assert isinstance(caught.value.__cause__, IntegrityError if end == "flush" else type(None))


@pytest.mark.parametrize("end", ["rollback", "close"])
async def test_nothing_can_be_written_after_a_rollback_inside_the_block(
    session_maker: SessionMaker, observer: Connection, end: str, job: Job
) -> None:
    with pytest.raises(InvalidRequestError):
        async with job_transaction(delivered(job, session_maker)) as session:
            await getattr(session, end)()
            session.add(User(id=1))
            await session.commit()
    assert (await state(observer), await users(observer)) == ("queued", 0)


async def test_nothing_can_be_written_after_the_block(session_maker: SessionMaker, engine: AsyncEngine) -> None:
    job = await committed(session_maker)
    async with job_transaction(delivered(job, session_maker)) as session:
        pass
    with pytest.raises(InvalidRequestError):
        await session.execute(text("INSERT INTO users VALUES (2, '')"))
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# What a dead worker leaves


@contextlib.asynccontextmanager
async def one_connection(url: str, **options: Any) -> Any:
    """A session maker whose sessions all have the same connection."""
    async with engine_at(url, pool_size=1, max_overflow=0, pool_timeout=5, **options) as engine:
        yield async_sessionmaker(engine, expire_on_commit=False)


async def shown(session: AsyncSession) -> list[str]:
    return [await session.scalar(text(f"SHOW {name}")) or "" for name in SETTINGS]


@pytest.mark.parametrize("end", ["commit", "rollback", "superseded"])
async def test_its_settings_hold_for_its_transaction_alone(database_url: str, end: str) -> None:
    server = {"client_connection_check_interval": "7s", "idle_in_transaction_session_timeout": "70s"}
    connect = {"connect_args": {"server_settings": server}}
    async with one_connection(database_url, **connect) as session_maker:
        job = await committed(session_maker)
        changes = {"attempt": 2} if end == "superseded" else {}
        with contextlib.suppress(ZeroDivisionError, JobSuperseded):
            async with job_transaction(delivered(job, session_maker, **changes)) as session:
                assert await shown(session) == ["1s", "8s"]
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                if end == "rollback":
                    raise ZeroDivisionError
        async with session_maker() as session:
            assert await shown(session) == ["7s", "70s"]
            assert end == "superseded" or await session.scalar(text("SELECT pg_backend_pid()")) == pid


async def test_a_transaction_that_does_nothing_is_ended_and_its_locks_with_it(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    with pytest.raises(DBAPIError) as caught:
        async with job_transaction(delivered(job, session_maker, idle_limit=0.1)) as session:
            session.add(User(id=1))
            await session.flush()
            async with asyncio.timeout(5), observer.transaction():
                await observer.execute("LOCK TABLE coord_jobs, users")  # held by the transaction until it is ended
    assert is_retryable(caught.value)
    assert (await state(observer), await users(observer)) == ("queued", 0)


async def test_a_busy_transaction_is_not_ended(session_maker: SessionMaker, observer: Connection, job: Job) -> None:
    async with job_transaction(delivered(job, session_maker, idle_limit=0.1)) as session:
        await session.execute(text("SELECT pg_sleep(0.3)"))
    assert await state(observer) == "done"


async def test_a_workers_transactions_can_be_found_by_the_lock_they_hold(
    session_maker: SessionMaker, observer: Connection
) -> None:
    held = """
        SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted
        AND classid = $1 AND objid = $2 AND objsubid = 2
    """
    jobs = [await committed(session_maker) for _ in range(2)]
    async with job_transaction(delivered(jobs[0], session_maker)) as one:
        async with job_transaction(delivered(jobs[1], session_maker)) as other:
            pids = {await session.scalar(text("SELECT pg_backend_pid()")) for session in (one, other)}
            assert {row["pid"] for row in await observer.fetch(held, WORKER_LOCK_CLASS, WORKER_LOCK)} == pids
    assert await observer.fetch(held, WORKER_LOCK_CLASS, WORKER_LOCK) == []


# Locks and round trips


async def test_a_table_lock_inside_it_is_held_until_its_commit(
    session_maker: SessionMaker, observer: Connection
) -> None:
    held = """
        SELECT mode FROM pg_locks WHERE relation = 'users'::regclass AND granted AND mode = 'ShareRowExclusiveLock'
    """
    job = await committed(session_maker)
    async with job_transaction(delivered(job, session_maker)) as session:
        async with lock_tables(session, [User]):
            session.add(User(id=1))
            assert len(await observer.fetch(held)) == 1
        assert len(await observer.fetch(held)) == 1
        assert await state(observer) == "queued"
    assert await observer.fetch(held) == []
    assert (await state(observer), await users(observer)) == ("done", 1)


async def test_a_job_under_a_table_lock_takes_five_round_trips(database_url: str, session_maker: SessionMaker) -> None:
    """BEGIN, the claim, the lock, the effect, COMMIT."""
    jobs = [await committed(session_maker, a_task, n) for n in range(4)]
    async with Proxy(database_url).opened() as wire, one_connection(wire.url) as maker:
        create_db_context(maker)
        counts = []
        for n, job in enumerate(jobs):
            before = wire.round_trips
            async with job_transaction(delivered(job, maker)) as session, lock_tables(session, [User]):
                session.add(User(id=n))
            counts.append(wire.round_trips - before)
        assert counts[2:] == [5, 5], f"with {counts[:2]} when things were new"


async def test_claiming_is_one_statement(single: AsyncEngine, session_maker: SessionMaker, job: Job) -> None:
    async with job_transaction(delivered(await committed(session_maker), async_sessionmaker(single))):
        """Where the ledger is, each engine asks once."""
    async with statements(single) as seen, job_transaction(delivered(job, async_sessionmaker(single))):
        pass
    assert len(seen) == 1
    assert seen[0].startswith("UPDATE coord_jobs")


# Cancellation


async def cancelled(work: Any, how: str, reached: Any) -> None:
    """`work`, cancelled once `reached` is true of it."""
    scope = anyio.CancelScope()

    async def run() -> None:
        if how == "task":
            await work
        else:
            with scope:
                await work

    task = asyncio.create_task(run())
    await eventually(reached)
    (task if how == "task" else scope).cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled() or scope.cancelled_caught


async def nothing_is_left(observer: Connection, engine: AsyncEngine) -> None:
    async def quiet() -> bool:
        others = """
            SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'
        """
        return bool(await observer.fetchval(others) == 0 == engine.pool.checkedout())  # type: ignore[attr-defined]

    await eventually(quiet, within=2)


@pytest.mark.parametrize("how", ["task", "anyio"])
@pytest.mark.parametrize("where", ["claim", "lock", "statement", "between"])
async def test_a_cancelled_attempt_leaves_nothing_running_and_the_job_queued(
    engine: AsyncEngine, session_maker: SessionMaker, observer: Connection, how: str, where: str
) -> None:
    create_db_context(session_maker)  # as a worker does
    job = await committed(session_maker)
    entered = asyncio.Event()

    async def work() -> None:
        async with job_transaction(delivered(job, session_maker)) as session:
            session.add(User(id=1))
            await session.flush()
            entered.set()
            match where:
                case "lock":
                    async with lock_tables(session, [Item], timeout=None):
                        pass
                case "statement":
                    await session.execute(text("SELECT pg_sleep(60)"))
                case "between":
                    await asyncio.Event().wait()

    async def reached() -> bool:
        match where:
            case "claim":
                return await waiting_for_locks(observer, "UPDATE coord_jobs") > 0
            case "lock":
                return await waiting_for_locks(observer) > 0
            case "statement":
                asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
                return bool(await observer.fetchval(asleep))
        return entered.is_set()

    async with session_maker() as other:
        if where == "claim":
            await other.execute(select(Job).with_for_update())
        if where == "lock":
            await other.execute(text("LOCK TABLE items"))
        await cancelled(work(), how, reached)
    await nothing_is_left(observer, engine)
    assert (await state(observer), await users(observer)) == ("queued", 0)
    await apply(delivered(job, session_maker))
    assert (await state(observer), await users(observer)) == ("done", 1)
