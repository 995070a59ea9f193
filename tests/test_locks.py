"""Locks: in one order, under one deadline, gone at once when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, event, func, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import aliased

import coord.database.acquisition
import coord.locks
from coord import (
    DeadlockError,
    LockMode,
    LockTimeoutError,
    advisory_lock,
    create_db_context,
    get_transaction,
    lock_tables,
)
from tests.models import Item, Reserved, User, table_of
from tests.serving import engine_at, eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables")

ADVISORY = partial(advisory_lock, key="free", timeout=0)
WAITING = "SELECT pid FROM pg_locks WHERE NOT granted"
HELD = """SELECT mode FROM pg_locks JOIN pg_class ON pg_class.oid = relation
          WHERE relname = $1 AND granted AND pid <> pg_backend_pid() ORDER BY mode"""


@pytest.fixture(autouse=True, params=["coord_lock", "plain statements"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each promise holds both ways: where the ledger's function is installed, and where it is not."""
    if request.param == "plain statements":
        monkeypatch.setattr(coord.database.acquisition, "lock_function", lambda _: None)
    return str(request.param)


async def hold(
    stack: AsyncExitStack, session_maker: SessionMaker, *models: Any, mode: str = "EXCLUSIVE"
) -> AsyncSession:
    session = await stack.enter_async_context(session_maker())
    return await stack.enter_async_context(lock_tables(session, models, mode=mode))


@pytest.mark.parametrize("mode", [*LockMode, *LockMode.__members__])
async def test_every_mode_in_both_spellings(session_maker: SessionMaker, observer: Connection, mode: str) -> None:
    async with session_maker() as session, lock_tables(session=session, tables=[User], mode=mode):
        held = [row["mode"] for row in await observer.fetch(HELD, "users")]
        assert held == [LockMode(mode).title().replace(" ", "") + "Lock"]
    assert not await observer.fetch(HELD, "users")


def test_conflicts_are_those_of_postgresql() -> None:
    for ours, conflicting in coord.locks._CONFLICTS.items():
        for theirs in LockMode:
            assert (theirs in conflicting) == (ours in coord.locks._CONFLICTS[theirs])


async def test_the_default_excludes_itself_and_writers_and_not_readers(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(session_maker())
        await stack.enter_async_context(lock_tables(session, [User]))
        assert await observer.fetchval("SELECT count(*) FROM users") == 0
        await observer.execute("SET lock_timeout = '50ms'")
        with pytest.raises(Exception, match="lock timeout"):
            await observer.execute("INSERT INTO users VALUES (1, '')")
        async with session_maker() as other:
            with pytest.raises(LockTimeoutError):
                async with lock_tables(other, [User], timeout=0):
                    pass


async def test_the_block_is_the_transaction_when_none_is_open(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker() as session:
        async with lock_tables(session, [User]):
            session.add(User(id=1))
        assert await observer.fetchval("SELECT count(*) FROM users") == 1
        assert not session.in_transaction()
        with pytest.raises(KeyError):
            async with lock_tables(session, [User]):
                session.add(User(id=2))
                await session.flush()
                raise KeyError
        assert await observer.fetchval("SELECT count(*) FROM users") == 1


async def test_inside_a_transaction_the_lock_lasts_as_long_as_it(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker() as session:
        async with session.begin():
            async with lock_tables(session, [User]):
                pass
            assert await observer.fetch(HELD, "users")
        assert not await observer.fetch(HELD, "users")
        async with session.begin():
            with pytest.raises(KeyError):
                async with get_transaction(session), lock_tables(session, [User]):
                    raise KeyError
            assert not await observer.fetch(HELD, "users")


async def test_the_lock_comes_before_any_pending_change(session_maker: SessionMaker, observer: Connection) -> None:
    async with AsyncExitStack() as stack:
        await hold(stack, session_maker, User)
        for explicit in (False, True):
            session = await stack.enter_async_context(session_maker())
            if explicit:
                await session.begin()
            session.add(User(id=1))
            with pytest.raises(LockTimeoutError):
                async with lock_tables(session, [User, Item], timeout=0.05):
                    pytest.fail("not to be had")
            assert not await observer.fetch(HELD, "items")
            assert session.new, "a refused lock must not cost the pending change"
    async with session_maker() as session:
        session.add(User(id=1))
        async with lock_tables(session, [User]):
            assert session.new
        assert await observer.fetchval("SELECT count(*) FROM users") == 1


async def test_a_transaction_is_usable_after_a_lock_timeout_and_its_settings_are_as_before(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with AsyncExitStack() as stack:
        await hold(stack, session_maker, Item)
        async with session_maker() as session, session.begin():
            session.add(User(id=1))
            await session.flush()
            await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
            with pytest.raises(LockTimeoutError):
                async with lock_tables(session, [User, Item], timeout=0.05):
                    pytest.fail("not to be had")
            assert await session.scalar(text("SHOW lock_timeout")) == "1234ms"
            async with lock_tables(session, [User], timeout="200ms"):
                assert await session.scalar(text("SHOW lock_timeout")) == "1234ms"
            session.add(User(id=2))
        assert await observer.fetchval("SELECT count(*) FROM users") == 2
    async with session_maker() as session:
        before = await session.scalar(text("SHOW lock_timeout"))
        await session.rollback()
        async with lock_tables(session, [User]):
            pass
        assert await session.scalar(text("SHOW lock_timeout")) == before


async def test_the_error_names_the_tables_and_who_holds_them(session_maker: SessionMaker) -> None:
    async with AsyncExitStack() as stack:
        holder = await hold(stack, session_maker, Reserved)
        pid = await holder.scalar(text("SELECT pg_backend_pid()"))
        async with session_maker() as session:
            with pytest.raises(LockTimeoutError, match=r"Other Shop.order, users in EXCLUSIVE mode") as caught:
                async with lock_tables(
                    session, [User, Reserved], mode=LockMode.EXCLUSIVE, timeout=timedelta(seconds=0.05)
                ):
                    pytest.fail("not to be had")
        assert caught.value.tables == ("Other Shop.order", "users")
        assert [(seen.pid, seen.mode, seen.table) for seen in caught.value.holders] == [
            (pid, "ExclusiveLock", '"Other Shop"."order"')
        ]
        assert caught.value.retryable


async def test_the_timeout_is_one_deadline_for_all_tables(session_maker: SessionMaker) -> None:
    """The first table comes free after 0.3 s; the second never. Counted anew, the second would give up at 0.8 s."""
    async with AsyncExitStack() as stack:
        items = AsyncExitStack()
        await hold(items, session_maker, Item)
        await hold(stack, session_maker, User)
        async with session_maker() as session:
            releasing = asyncio.create_task(release_after(0.3, items))
            began = time.monotonic()
            with pytest.raises(LockTimeoutError):
                async with lock_tables(session, [Item, User], timeout=0.5):
                    pytest.fail("not to be had")
            assert 0.45 < time.monotonic() - began < 0.7
            await releasing


async def release_after(delay: float, locks: AsyncExitStack) -> None:
    await asyncio.sleep(delay)
    await locks.aclose()


async def test_two_spellings_of_one_table_sort_alike(session_maker: SessionMaker, engine: AsyncEngine) -> None:
    explicit = Table("users", MetaData(), Column("id", Integer, primary_key=True), schema="public")
    statements = await locked_in(session_maker, engine, [table_of(User), Reserved, explicit, Item, User])
    assert statements == ['"Other Shop"."order"', "items", "public.users", "users"]


async def test_the_schema_translate_map_is_honoured(engine: AsyncEngine) -> None:
    translated = engine.execution_options(schema_translate_map={None: "Other Shop"})
    order = Table("order", MetaData(), Column("id", Integer, primary_key=True))
    assert await locked_in(async_sessionmaker(translated), engine, [order]) == ['"Other Shop"."order"']


@pytest.mark.parametrize("name", ["100%", "50%(of) %s", "%%", "a%d:b", 'per"cent%(fullname)s'])
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_a_table_may_have_any_name(engine: AsyncEngine, observer: Connection, name: str, level: str) -> None:
    """It is locked, named in the error, and usable as before."""
    table = Table(name, MetaData(), Column("id", Integer, primary_key=True))
    async with engine.begin() as connection:
        await connection.run_sync(table.create)
    try:
        levelled = engine.execution_options(isolation_level=level)
        async with AsyncSession(levelled) as holder, lock_tables(holder, [table]):
            assert [row["mode"] for row in await observer.fetch(HELD, name)] == ["ShareRowExclusiveLock"]
            async with AsyncSession(levelled) as session:
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [table, User], timeout=0.05):
                        pass
        assert name in caught.value.tables
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(table.drop)


async def locked_in(session_maker: SessionMaker, engine: AsyncEngine, tables: list[Any]) -> list[str]:
    """The tables in the order in which they are locked, as an engine's listeners see it."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("LOCK TABLE "):
            seen.append(statement.removeprefix("LOCK TABLE ").split(" IN ")[0])
        elif "coord_lock" in statement:
            seen.extend(parameters[1])

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        async with session_maker() as session, lock_tables(session, tables):
            pass
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
    return seen


@pytest.mark.parametrize("how", ["anyio", "task"])
@pytest.mark.parametrize("explicit", [False, True])
async def test_a_cancelled_waiter_leaves_the_lock_queue_at_once(
    session_maker: SessionMaker, observer: Connection, how: str, explicit: bool
) -> None:
    """An orphan waiting for ACCESS EXCLUSIVE would block every later reader."""
    waiting = asyncio.Event()

    async def work() -> None:
        async with session_maker() as session:
            if explicit:
                await session.begin()
            waiting.set()
            async with lock_tables(session, [User], mode="ACCESS EXCLUSIVE", timeout=30):
                pytest.fail("not to be had")

    async with AsyncExitStack() as stack:
        await hold(stack, session_maker, User, mode="ACCESS SHARE")
        if how == "anyio":
            async with anyio.create_task_group() as group:
                group.start_soon(work)
                await eventually(lambda: observer.fetch(WAITING))
                group.cancel_scope.cancel()
        else:
            task = asyncio.create_task(work())
            await eventually(lambda: observer.fetch(WAITING))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not await observer.fetch(WAITING)
        await observer.execute("SET lock_timeout = '100ms'")
        assert await observer.fetchval("SELECT count(*) FROM users") == 0


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
async def test_tasks_locking_in_any_order_never_deadlock(
    session_maker: SessionMaker, observer: Connection, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """Eight tasks insert `max(n) + 1` into two tables; with the sorting switched off they deadlock."""
    if not ordered:
        monkeypatch.setattr(coord.locks, "sorted", list, raising=False)
        monkeypatch.setattr(
            coord.locks, "_in_one_order", coord.locks._in_one_order.__wrapped__
        )  # which keeps what was sorted
    commits, waits, deadlocks = 0, [0.0], 0
    loop = asyncio.get_running_loop()
    began = loop.time()
    enough = 100
    """Commits without which the tasks have hardly met."""

    def is_over() -> bool:
        if ordered:
            return commits >= enough and loop.time() > began + 3
        return deadlocks > 0 or loop.time() > began + 20

    async def work(models: list[Any]) -> None:
        nonlocal commits, deadlocks
        while not is_over():
            asked = loop.time()
            try:
                async with session_maker() as session, lock_tables(session, models, timeout=5):
                    waits.append(loop.time() - asked)
                    for model in models:
                        column = model.number if model is Item else model.id
                        highest = await session.scalar(select(func.max(column))) or 0
                        session.add(Item(number=highest + 1) if model is Item else User(id=highest + 1))
                        await session.flush()
                commits += 1
            except DeadlockError:
                deadlocks += 1
            except LockTimeoutError:
                assert not ordered

    await asyncio.gather(*(work([User, Item] if n % 2 else [Item, User]) for n in range(8)))
    if not ordered:
        assert deadlocks > 0
        return
    assert deadlocks == 0
    assert max(waits) < 5
    assert await observer.fetchrow("SELECT max(id), count(*) FROM users") == (commits, commits)
    assert await observer.fetchrow("SELECT max(number), count(*), count(DISTINCT number) FROM items") == (commits,) * 3


async def test_a_deadlock_is_a_deadlock_error_and_the_transaction_stays_usable(session_maker: SessionMaker) -> None:
    async with session_maker() as one, session_maker() as two:
        for session, model in ((one, User), (two, Item)):
            await session.begin()
            await session.execute(text(f"LOCK TABLE {model.__tablename__}"))
        results = await asyncio.gather(lock_or_retreat(one, Item), lock_or_retreat(two, User))
    assert sorted(results) == ["deadlock, and 1", "locked"]


async def lock_or_retreat(session: AsyncSession, model: Any) -> str:
    try:
        async with lock_tables(session, [model], timeout=30):
            return "locked"
    except DeadlockError:
        answer = await session.scalar(text("SELECT 1"))
        await session.rollback()
        return f"deadlock, and {answer}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "MAXIMUM"}, "'MAXIMUM' is not a lock mode; the modes are ACCESS SHARE"),
        ({"mode": "EXCLUSIVE; DROP TABLE users"}, "is not a lock mode"),
        ({"tables": []}, "at least one mapped class"),
        ({"tables": User}, "at least one mapped class"),
        ({"tables": ["users"]}, "is not a mapped class"),
        ({"tables": [aliased(User)]}, "is not a mapped class"),
        ({"timeout": -1}, "0 or more"),
        ({"timeout": math.nan}, "finite"),
        ({"timeout": math.inf}, "finite"),
        ({"timeout": "5 parsecs"}, "'500ms' or '5s'"),
        ({"timeout": "1s'; DROP TABLE users; --"}, "'500ms' or '5s'"),
        ({"timeout": 1e12}, "at most"),
    ],
)
async def test_bad_input_is_refused_before_any_sql(
    session_maker: SessionMaker, engine: AsyncEngine, arguments: dict[str, Any], message: str
) -> None:
    seen: list[str] = []
    listener = lambda *arguments: seen.append(arguments[2])
    event.listen(engine.sync_engine, "before_cursor_execute", listener)
    try:
        async with session_maker() as session:
            with pytest.raises(ValueError, match=message):
                async with lock_tables(session, **{"tables": [User], **arguments}):
                    pytest.fail("not to be had")
            assert not session.in_transaction()
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", listener)
    assert not seen


async def test_an_engine_that_cannot_hold_locks_is_refused(engine: AsyncEngine) -> None:
    async with async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))() as session:
        with pytest.raises(ValueError, match=r"postgresql\+asyncpg"):
            async with lock_tables(session, [User]):
                pytest.fail("not to be had")
    async with async_sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"))() as session:
        with pytest.raises(InvalidRequestError, match="AUTOCOMMIT"):
            async with lock_tables(session, [User]):
                pytest.fail("not to be had")


async def test_a_table_that_is_not_there_is_the_databases_error(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        with pytest.raises(DBAPIError, match="does not exist"):
            async with lock_tables(session, [Table("nowhere", MetaData(), Column("id", Integer))]):
                pytest.fail("not to be had")


@pytest.mark.parametrize("key", [1, -(2**63), (3, -4), "a name", "ein längerer Name"])
async def test_an_advisory_lock_excludes_its_own_key_alone(
    session_maker: SessionMaker, observer: Connection, key: Any
) -> None:
    async with session_maker() as holder, session_maker() as other:
        async with advisory_lock(holder, key):
            with pytest.raises(LockTimeoutError) as caught:
                async with advisory_lock(other, key, timeout=0):
                    pytest.fail("not to be had")
            assert len(caught.value.holders) == 1
            async with advisory_lock(other, 77, timeout=0):
                pass
        async with advisory_lock(holder, key, shared=True), advisory_lock(other, key, shared=True, timeout=0):
            pass
    here = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    assert not await observer.fetch(f"SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND {here}")


@pytest.mark.parametrize("key", [2**63, (1, 2**31), True, (1, 2, 3), 1.5, None])
async def test_a_key_that_postgresql_cannot_hold_is_refused(session_maker: SessionMaker, key: Any) -> None:
    async with session_maker() as session:
        with pytest.raises(ValueError, match="64-bit integer"):
            async with advisory_lock(session, key):
                pytest.fail("not to be had")


async def test_ending_the_transaction_inside_the_block_is_reported(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        with pytest.raises(RuntimeError, match="ended inside the block"):
            async with lock_tables(session, [User]):
                await session.commit()


async def test_a_lock_works_under_the_context(session_maker: SessionMaker, observer: Connection) -> None:
    async with create_db_context(session_maker)() as session:
        await session.execute(select(User))
        async with lock_tables(session, [User]):
            session.add(User(id=1))
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("others", [[], [Reserved]])
async def test_the_lock_comes_before_the_snapshot(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection, level: str, others: list[Any]
) -> None:
    """Whoever waited for the lock sees what its last holder committed, though he holds another already."""
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(session_maker())
        holding = await stack.enter_async_context(AsyncExitStack())
        await holding.enter_async_context(lock_tables(holder, [User, Item]))
        holder.add(User(id=1))

        async def count() -> int | None:
            async with AsyncSession(engine.execution_options(isolation_level=level)) as session:
                async with AsyncExitStack() as locks:
                    for other in others:
                        await locks.enter_async_context(lock_tables(session, [other]))
                    await locks.enter_async_context(lock_tables(session, [User, Item], timeout=10))
                    return await session.scalar(select(func.count()).select_from(User))

        counting = asyncio.create_task(count())
        await eventually(lambda: observer.fetch(WAITING))
        await holding.aclose()
        assert await counting == 1


@pytest.mark.parametrize("lock", [lambda session: lock_tables(session, [User], timeout=0), ADVISORY])
async def test_who_does_not_wait_for_a_lock_waits_a_second_for_a_connection(
    single: AsyncEngine, lock: Callable[[AsyncSession], AbstractAsyncContextManager[Any]]
) -> None:
    """One that has yet to be made is had; one that others have is not waited for as long as the pool would."""
    async with AsyncSession(single) as session, lock(session):
        pass
    async with single.connect(), AsyncSession(single) as session:
        began = time.monotonic()
        with pytest.raises(LockTimeoutError, match="waiting for a connection"):
            async with lock(session):
                pass
        assert 1 <= time.monotonic() - began < 3


async def test_a_table_that_is_not_there_is_sqlalchemys_own_error(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        with pytest.raises(ProgrammingError, match="nowhere"):
            async with lock_tables(session, [Table("nowhere", MetaData(), Column("id", Integer, primary_key=True))]):
                pass


async def test_a_level_that_was_set_by_sql_is_refused_where_its_snapshot_would_be_older_than_the_lock(
    session_maker: SessionMaker, way: str
) -> None:
    async with session_maker() as session:
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        if way == "plain statements":
            async with lock_tables(session, [User]):
                return
        with pytest.raises(InvalidRequestError, match=r'isolation_level="REPEATABLE READ"'):
            async with lock_tables(session, [User]):
                pass


async def test_settings_of_the_connection_survive_a_lock(database_url: str) -> None:
    async with engine_at(database_url, pool_size=1, max_overflow=0) as engine, AsyncSession(engine) as session:
        await session.execute(text("SET lock_timeout = '11s'"))
        await session.execute(text("SET statement_timeout = '12s'"))
        await session.commit()
        for explicit in (False, True):
            if explicit:
                await session.execute(text("SELECT 1"))
            async with lock_tables(session, [User, Item], timeout=0.5):
                shown = [await session.scalar(text(f"SHOW {name}")) for name in ("lock_timeout", "statement_timeout")]
                assert shown == ["11s", "12s"]
            await session.rollback()


async def test_the_servers_own_statement_timeout_is_no_lock_timeout(session_maker: SessionMaker) -> None:
    async with AsyncExitStack() as stack:
        await hold(stack, session_maker, User)
        async with session_maker() as session, session.begin():
            await session.execute(text("SET LOCAL statement_timeout = '50ms'"))
            with pytest.raises(DBAPIError, match="statement timeout"):
                async with lock_tables(session, [User], timeout=None):
                    pytest.fail("not to be had")
            await session.rollback()


async def test_a_lock_refused_by_the_servers_own_timeout_leaves_the_transaction_usable(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with AsyncExitStack() as stack:
        await hold(stack, session_maker, Item)
        async with session_maker() as session, session.begin():
            session.add(User(id=1))
            await session.flush()
            await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
            with pytest.raises(LockTimeoutError):
                async with lock_tables(session, [Item], timeout=None):
                    pytest.fail("not to be had")
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


@pytest.mark.parametrize("how", ["anyio", "task"])
async def test_a_commit_after_a_cancelled_lock_stores_everything_or_raises(
    session_maker: SessionMaker, observer: Connection, how: str
) -> None:
    """Cancelled at any moment of an uncontended lock, granted or not, the caller may go on and commit."""
    stored = 0
    for n in range(1, 81):
        with contextlib.suppress(PendingRollbackError):
            async with session_maker() as session, session.begin():
                session.add(User(id=n))
                await session.flush()
                delay = n * 0.00005
                if how == "anyio":
                    with anyio.move_on_after(delay):
                        await lock_once(session)
                else:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(lock_once(session), delay)
            stored += 1
    assert await observer.fetchval("SELECT count(*) FROM users") == stored


async def lock_once(session: AsyncSession) -> None:
    async with lock_tables(session, [Item]):
        pass


async def test_an_exhausted_pool_counts_against_the_deadline(database_url: str) -> None:
    async with (
        engine_at(database_url, pool_size=1, max_overflow=0) as engine,
        AsyncSession(engine) as holder,
        AsyncSession(engine) as session,
    ):
        await holder.execute(text("SELECT 1"))
        began = time.monotonic()
        with pytest.raises(LockTimeoutError, match="waiting for a connection"):
            async with lock_tables(session, [User], timeout=0.2):
                pytest.fail("not to be had")
        assert time.monotonic() - began < 0.6
