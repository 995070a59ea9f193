"""Every statement goes through SQLAlchemy: listeners see it, PostgreSQL's own guards hold, commits are honest."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from coord import (
    Coordinator,
    WaitTimeoutError,
    create_db_context,
    enqueue,
    job_transaction,
    lock_tables,
    wait_for_row_change,
)
from coord.database.engine import prepare
from tests.ledger import delivered
from tests.models import Item, User
from tests.serving import engine_at, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")


@pytest.mark.parametrize("name", ["before_cursor_execute", "after_cursor_execute"])
async def test_an_engines_listeners_see_the_jobs_row_its_claim_the_lock_and_every_poll(
    database_url: str, redis_url: str, name: str
) -> None:
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(" ".join(statement.split()))

    engine = create_async_engine(database_url, pool_size=3, max_overflow=0)
    event.listen(engine.sync_engine, name, note)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    async with Coordinator(maker, redis=redis_url), maker() as session:
        session.add(User(id=1))
        job = await enqueue(session, "a_task")
        await session.commit()
        assert [each.split(" (")[0] for each in seen if "INSERT" in each] == [
            "INSERT INTO coord_jobs",
            "INSERT INTO users",
        ]
        seen.clear()
        async with job_transaction(delivered(job, maker)) as working, lock_tables(working, [User]):
            pass
        assert seen[0].startswith("UPDATE coord_jobs SET state=")
        assert "coord_lock(" in seen[-1]
        seen.clear()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, 1, interval=0.05, timeout=0.3)
        assert len([each for each in seen if "FROM users" in each or "JOIN users" in each]) >= 3
    await engine.dispose()


async def test_a_transaction_that_has_enqueued_is_idle_and_ended_as_such(
    database_url: str, observer: Connection
) -> None:
    """With its locks: no answer is left unread, which PostgreSQL would take for a busy client."""
    options = {"server_settings": {"idle_in_transaction_session_timeout": "300ms"}}
    async with engine_at(database_url, connect_args=options) as engine, async_sessionmaker(engine)() as session:
        with pytest.raises(PendingRollbackError):
            async with lock_tables(session, [Item]):
                await enqueue(session, "a_task")
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                state = await observer.fetchval("SELECT state FROM pg_stat_activity WHERE pid = $1", pid)
                assert state == "idle in transaction"
                no_locks = "SELECT NOT EXISTS (SELECT FROM pg_locks WHERE pid = $1)"
                await eventually(lambda: observer.fetchval(no_locks, pid))
                with pytest.raises(DBAPIError) as caught:
                    await session.execute(text("SELECT 1"))
                assert caught.value.connection_invalidated


def insert_another(session: Session, *_: Any) -> None:
    session.connection().execute(text("INSERT INTO items (number) VALUES (1)"))


def fail_and_swallow(session: Session, *_: Any) -> None:
    with suppress(DBAPIError):
        session.connection().execute(text("SELECT 1 / 0"))


def fail_in_a_savepoint(session: Session, *_: Any) -> None:
    with suppress(DBAPIError), session.connection().begin_nested():
        session.connection().execute(text("SELECT 1 / 0"))


def refuse(*_: Any) -> None:
    raise ZeroDivisionError


def do_nothing(*_: Any) -> None:
    pass


ACTIONS = [do_nothing, insert_another, fail_and_swallow, fail_in_a_savepoint, refuse]
SESSION_EVENTS = ["before_flush", "after_flush", "before_commit", "after_begin", "do_orm_execute"]
MAPPER_EVENTS = ["before_insert", "after_insert", "before_update"]
ENGINE_EVENTS = ["before_execute", "before_cursor_execute", "after_cursor_execute", "commit", "savepoint"]
STEPS = ["add", "execute", "raw", "savepoint", "enqueue", "lock", "fail"]


@asynccontextmanager
async def listening(
    engine: AsyncEngine, listeners: list[tuple[str, Callable[..., None]]]
) -> AsyncIterator[type[Session]]:
    """A class of sessions whose events, and those of the engine and of the mapper, have these listeners."""
    kind = type("Listened", (Session,), {})
    added = []
    for name, action in listeners:
        if name in SESSION_EVENTS:
            event.listen(kind, name, lambda first, *_, do=action: do(getattr(first, "session", first)))
            continue
        of_row = name in MAPPER_EVENTS
        target: Any = User if of_row else engine.sync_engine
        listener = _once_a_statement(action, of_row=of_row)
        event.listen(target, name, listener)
        added.append((target, name, listener))
    try:
        yield kind
    finally:
        for each in added:
            event.remove(*each)


def _once_a_statement(action: Callable[..., None], *, of_row: bool) -> Callable[..., None]:
    """What a listener executes is listened to as well."""
    running = False

    class Shim:
        def __init__(self, connection: Any) -> None:
            self.connection = lambda: connection

    def listener(*arguments: Any) -> None:
        nonlocal running
        if running:
            return
        running = True
        try:
            action(Shim(arguments[1] if of_row else arguments[0]))
        finally:
            running = False

    return listener


# SQLAlchemy's own, of what is added after a flush has failed: nothing of that may be stored, which is looked at.
@pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active transaction")
@pytest.mark.slow
@settings(max_examples=75, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    listeners=st.lists(
        st.tuples(st.sampled_from(SESSION_EVENTS + MAPPER_EVENTS + ENGINE_EVENTS), st.sampled_from(ACTIONS)), max_size=3
    ),
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
)
@example(listeners=[("commit", fail_and_swallow)], steps=["add"])
@example(listeners=[("commit", fail_in_a_savepoint)], steps=["add"])
@example(listeners=[], steps=["fail", "add", "fail", "add"])
async def test_a_commit_that_raises_has_stored_nothing_and_one_that_returns_has_stored_all(
    database_url: str, observer: Connection, listeners: list[tuple[str, Callable[..., None]]], steps: list[str]
) -> None:
    await observer.execute("DELETE FROM items; DELETE FROM users; DELETE FROM coord_jobs")
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    prepare(engine)
    wanted, jobs, committed_ = 0, 0, False
    try:
        async with (
            listening(engine, listeners) as kind,
            async_sessionmaker(engine, sync_session_class=kind)() as session,
        ):
            try:
                for step in steps:
                    wanted += step in ("add", "execute", "raw", "savepoint")
                    jobs += step == "enqueue"
                    await take(session, step)
                await session.commit()
                committed_ = True
            except (SQLAlchemyError, ZeroDivisionError):
                await session.rollback()
    finally:
        await engine.dispose()
    found = await observer.fetchrow("SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM coord_jobs)")
    assert tuple(found) == ((wanted, jobs) if committed_ else (0, 0))


async def take(session: AsyncSession, step: str) -> None:
    match step:
        case "add":
            session.add(User(name="added"))
        case "execute":
            await session.execute(text("INSERT INTO users (name) VALUES ('executed')"))
        case "raw":
            await (await session.connection()).exec_driver_sql("INSERT INTO users (name) VALUES ('raw')")
        case "savepoint":
            async with session.begin_nested():
                session.add(User(name="nested"))
        case "enqueue":
            await enqueue(session, "a_task")
        case "lock":
            await session.execute(select(User))
            async with lock_tables(session, [User]):
                pass
        case "fail":
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))


async def test_many_jobs_of_one_transaction_let_others_run_meanwhile(session_maker: SessionMaker) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    async with create_db_context(session_maker)() as session:
        for _ in range(200):
            await enqueue(session, "a_task")
    task.cancel()
    assert turns >= 200
