"""Waiting: no change missed, no connection held, no call later than its deadline."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, event, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import aliased
from sqlalchemy.pool import NullPool

import coord.waiting.poller
import coord.waiting.waiter
import coord.waiting.watcher
from coord import (
    Coordinator,
    RowNotFoundError,
    UncommittedChangesError,
    WaitTimeoutError,
    advisory_lock,
    create_db_context,
    get_transaction,
    lock_tables,
    wait_for_row_change,
    watch_row,
)
from coord.waiting.watcher import Watcher
from tests.models import Account, Document, Item, Point, Reserved, User
from tests.serving import all_given_back, engine_at, eventually
from tests.waits import HeldClosing, iterations, registered, waiters, waiting

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "nobody_left_waiting", "read_settings")


async def test_a_change_by_anybody_is_seen_within_the_interval(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user)
        await registered()
        changed = time.monotonic()
        await observer.execute("UPDATE users SET name = 'after'")
        row = await task
        assert time.monotonic() - changed < 0.15
        assert row.name == "after"
        assert row in session
        assert not session.dirty


async def test_a_row_changed_before_the_wait_began_is_seen(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async with session_maker() as session:
        loaded = await session.get(User, user)
        assert loaded is not None
        await observer.execute("UPDATE users SET name = 'after'")
        row = await wait_for_row_change(session, User, user, interval=60, timeout=5)
        assert row is loaded
        assert row.name == "after"


async def test_a_row_changed_after_its_own_commit_is_seen(session_maker: SessionMaker, observer: Connection) -> None:
    async with session_maker() as session:
        added = User(id=5, name="mine")
        session.add(added)
        await session.commit()
        await observer.execute("UPDATE users SET name = 'after' WHERE id = 5")
        assert (await wait_for_row_change(session, User, 5, interval=60, timeout=5)) is added
        assert added.name == "after"


@pytest.mark.parametrize("since", [{"name": "older"}, User(id=1, name="older")])
async def test_since_is_what_the_caller_has_seen(session_maker: SessionMaker, user: int, since: Any) -> None:
    async with session_maker() as session:
        row = await wait_for_row_change(session, User, user, since=since, columns=["name"], interval=60, timeout=5)
        assert row.name == "before"


async def test_a_row_that_a_commit_expired_has_no_baseline_and_the_wait_says_so(
    engine: AsyncEngine, observer: Connection, user: int
) -> None:
    async with async_sessionmaker(engine, expire_on_commit=True)() as session:
        loaded = await session.get(User, user)
        await session.commit()

        async def call() -> User:
            return await wait_for_row_change(session, User, user, interval=0.05, timeout=10)

        task = asyncio.create_task(call())
        with pytest.warns(UserWarning, match="was expired by a commit") as caught:
            await registered()
        assert caught[0].filename == __file__, "it does not point at the caller"
        await observer.execute("UPDATE users SET name = 'after'")
        assert (await task) is loaded
        assert loaded is not None
        assert loaded.name == "after"


async def test_a_change_after_the_first_read_is_the_answer_at_the_deadline(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    """An interval of a minute never comes; the last look does."""
    async with session_maker() as session:
        task = waiting(session, User, user, interval=60, timeout=1)
        await registered()
        await observer.execute("UPDATE users SET name = 'after'")
        assert (await task).name == "after"


async def test_no_change_is_a_timeout_that_says_what_and_how_long(session_maker: SessionMaker, user: int) -> None:
    async with session_maker() as session:
        began = time.monotonic()
        with pytest.raises(WaitTimeoutError, match=r"No change detected on User\(1\)") as caught:
            await wait_for_row_change(session, User, user, timeout=timedelta(seconds=0.3))
        assert 0.3 <= time.monotonic() - began < 0.8
        assert (caught.value.model, caught.value.pk_value) == (User, user)
        assert 0.3 <= caught.value.waited < 0.8
        assert isinstance(caught.value, TimeoutError)
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, user, timeout=0)


async def test_a_deadline_that_is_far_when_the_wait_begins_is_kept(
    session_maker: SessionMaker, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that begins while another waits, and once that has gone."""
    for module in (coord.waiting.waiter, coord.waiting.watcher):
        monkeypatch.setattr(module, "NEAR_SECONDS", 0.1)

    async def seconds(timeout: float) -> float:
        began = time.monotonic()
        async with session_maker() as session:
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, User, user, interval=60, timeout=timeout)
        return time.monotonic() - began

    async with asyncio.timeout(10):
        for timeouts in ((0.4, 0.7), (0.5,)):
            waited = await asyncio.gather(*map(seconds, timeouts))
            assert all(timeout <= took < timeout + 1 for timeout, took in zip(timeouts, waited, strict=True))


async def test_only_the_watched_columns_count(session_maker: SessionMaker, observer: Connection) -> None:
    await observer.execute("INSERT INTO accounts VALUES ('eu', 7, 'open', 0, 1)")
    async with session_maker() as session:
        task = waiting(session, Account, ("eu", 7), columns=[Account.state])
        await registered()
        await observer.execute("UPDATE accounts SET balance = 5, version = 2")
        done, _ = await asyncio.wait([task], timeout=0.2)
        assert not done
        await observer.execute("UPDATE accounts SET status = 'closed', version = 3")
        row = await task
        assert (row.state, row.balance, row.version) == ("closed", 5, 3)


@pytest.mark.parametrize("pk_value", [("eu", 7), {"region": "eu", "number": 7}])
@pytest.mark.parametrize("column", ["state", "status", Account.state, Account.__table__.c.status])
async def test_composite_keys_and_renamed_attributes(
    session_maker: SessionMaker, observer: Connection, pk_value: Any, column: Any
) -> None:
    await observer.execute("INSERT INTO accounts VALUES ('eu', 7, 'open', 0, 1), ('us', 7, 'open', 0, 1)")
    async with session_maker() as session:
        task = waiting(session, Account, pk_value, columns=[column])
        await registered()
        await observer.execute("UPDATE accounts SET status = 'closed' WHERE region = 'eu'")
        assert (await task).state == "closed"


async def test_until_needs_no_change_and_gets_a_detached_row(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    seen: list[str] = []

    def finished(row: User) -> bool:
        assert row not in session
        seen.append(row.name)
        return row.name == "done"

    async with session_maker() as session:
        task = waiting(session, User, user, until=finished)
        await registered()
        await observer.execute("UPDATE users SET name = 'half'")
        await eventually(lambda: "half" in seen)
        await observer.execute("UPDATE users SET name = 'done'")
        assert (await task).name == "done"
        assert seen == ["before", "half", "done"]
        assert (await wait_for_row_change(session, User, user, until=finished, timeout=1)).name == "done"
        with pytest.raises(ZeroDivisionError):
            await wait_for_row_change(session, User, user, until=lambda row: row.id / 0 > 1)


async def test_a_row_that_is_not_there_and_one_that_goes(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async with session_maker() as session:
        with pytest.raises(RowNotFoundError, match=r"User\(2\) not found"):
            await wait_for_row_change(session, User, 2)
        task = waiting(session, User, user)
        await registered()
        await observer.execute("DELETE FROM users")
        with pytest.raises(LookupError, match=r"User\(1\) was deleted"):
            await task


async def test_a_pool_of_one_serves_two_hundred_waits(database_url: str, observer: Connection) -> None:
    await observer.execute("INSERT INTO users SELECT n, 'before' FROM generate_series(1, 200) AS n")
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=5)
    session_maker = async_sessionmaker(engine, expire_on_commit=False)
    async with AsyncExitStack() as stack:
        loaded: list[User | None] = []
        sessions = [await stack.enter_async_context(session_maker()) for _ in range(200)]
        for session, user_id in zip(sessions, range(1, 201), strict=True):
            loaded.append(await session.get(User, user_id))  # a session forgets what nobody refers to
            if user_id > 1:
                await session.commit()  # the first one's read is still open, and its wait ends it
            else:
                tasks = [waiting(session, User, user_id)]
                await registered()
        tasks += [waiting(session, User, n) for n, session in enumerate(sessions[1:], start=2)]
        assert engine.pool.checkedout() <= 1  # type: ignore[attr-defined]
        await observer.execute("UPDATE users SET name = 'after ' || id")
        rows = await asyncio.gather(*tasks)
        assert [row.name for row in rows] == [f"after {n}" for n in range(1, 201)]
        await all_given_back(engine)
    await engine.dispose()


async def test_more_rows_than_one_query_reads_are_all_watched(
    engine: AsyncEngine, session_maker: SessionMaker, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many at a time, whichever of them changes."""
    monkeypatch.setattr(coord.waiting.poller, "MAX_KEYS_PER_QUERY", 3)
    sizes: set[int] = set()

    def note(_connection: Any, _cursor: Any, _statement: str, parameters: Any, *_: Any) -> None:
        sizes.update(len(each) for each in parameters if isinstance(each, list))

    await observer.execute("INSERT INTO users SELECT n, 'before' FROM generate_series(1, 8) AS n")
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    async with AsyncExitStack() as stack:
        stack.callback(event.remove, engine.sync_engine, "before_cursor_execute", note)
        sessions = [await stack.enter_async_context(session_maker()) for _ in range(8)]
        tasks = {n: waiting(session, User, n) for n, session in enumerate(sessions, start=1)}
        await registered(8)
        for n in (8, 1, 5, 2, 7, 3, 6, 4):
            await observer.execute("UPDATE users SET name = 'after' WHERE id = $1", n)
            assert (await tasks.pop(n)).name == "after"
            assert not any(task.done() for task in tasks.values())
    assert max(sizes) == 3


async def test_what_postgresql_refuses_whatever_the_row_is_not_asked_for_each(
    engine: AsyncEngine, session_maker: SessionMaker, observer: Connection
) -> None:
    """Of thousands that wait as a column goes, the last would learn of it after as many queries."""
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    await observer.execute("INSERT INTO users SELECT n, 'before' FROM generate_series(1, 64) AS n")
    async with Coordinator(session_maker, read_settings={}), AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(session_maker()) for _ in range(64)]
        tasks = [waiting(session, User, n) for n, session in enumerate(sessions, start=1)]
        await registered(64)
        await observer.execute("ALTER TABLE users RENAME name TO gone")
        stack.push_async_callback(engine.dispose)
        stack.push_async_callback(observer.execute, "ALTER TABLE users RENAME gone TO name")
        event.listen(engine.sync_engine, "before_cursor_execute", note)
        stack.callback(event.remove, engine.sync_engine, "before_cursor_execute", note)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all("column users.name does not exist" in str(error) for error in errors)
        assert len(asked) < 10


async def test_the_callers_read_only_transaction_is_ended_and_an_explicit_block_is_not(
    session_maker: SessionMaker, engine: AsyncEngine, user: int
) -> None:
    async with session_maker() as session:
        await session.execute(select(Item))
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, user, timeout=0)
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        async with session.begin():
            await session.execute(select(Item))
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, User, user, timeout=0)
            assert session.in_transaction()
            assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]
    async with create_db_context(session_maker)() as session:
        await session.execute(select(Item))
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, user, timeout=0)
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_what_could_never_end_is_refused_at_once(session_maker: SessionMaker, user: int) -> None:
    async def refused(session: AsyncSession) -> None:
        with pytest.raises(UncommittedChangesError, match=r"Commit first|inside lock_tables"):
            await wait_for_row_change(session, User, user, timeout=1)

    async with session_maker() as session:
        session.add(User(id=2))
        await session.flush()
        await refused(session)
        await session.rollback()
        for statement in ("UPDATE users SET name = 'x'", "SELECT * FROM users FOR UPDATE", "LOCK TABLE items"):
            await session.execute(text(statement))
            await refused(session)
            await session.rollback()
        async with lock_tables(session, [Item], mode="ACCESS SHARE"):
            await refused(session)
        async with advisory_lock(session, 5):
            await refused(session)
        async with session.begin():
            async with lock_tables(session, [Item]):
                pass
            await refused(session)
        async with get_transaction(session), get_transaction(session):
            await session.execute(update(User).values(name="x"))
            await refused(session)
            await session.rollback()


async def test_unflushed_changes_survive_and_the_rest_is_current(
    session_maker: SessionMaker, observer: Connection
) -> None:
    await observer.execute("INSERT INTO accounts VALUES ('eu', 7, 'open', 0, 1)")
    async with session_maker() as session:
        account = await session.get(Account, ("eu", 7))
        assert account is not None
        pending = User(id=9)
        session.add(pending)
        account.balance = 42
        task = waiting(session, Account, ("eu", 7), columns=[Account.state, Account.balance])
        await registered()
        await observer.execute("UPDATE accounts SET status = 'closed', version = 2")
        assert (await task) is account
        assert (account.state, account.balance, account.version) == ("closed", 42, 2)
        assert pending in session.new
        await session.commit()
    assert await observer.fetchval("SELECT balance FROM accounts") == 42
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


async def test_the_row_can_be_changed_and_committed_afterwards(
    session_maker: SessionMaker, observer: Connection
) -> None:
    """Its version is the new one, both for an instance the session had and for one it gets."""
    await observer.execute("INSERT INTO accounts VALUES ('eu', 7, 'open', 0, 1)")
    for loaded in (True, False):
        async with session_maker() as session:
            if loaded:
                await session.get(Account, ("eu", 7))
            task = waiting(session, Account, ("eu", 7))
            await registered()
            await observer.execute("UPDATE accounts SET status = status || '+', version = version + 1")
            row = await task
            row.balance += 1
            await session.commit()
    assert await observer.fetchval("SELECT balance FROM accounts") == 2


async def test_a_table_in_another_schema_and_a_translated_one(
    engine: AsyncEngine, session_maker: SessionMaker, observer: Connection
) -> None:
    await observer.execute('INSERT INTO "Other Shop"."order" VALUES (1, $1)', "pending")
    translated = engine.execution_options(schema_translate_map={None: "Other Shop"})
    for maker, model in ((session_maker, Reserved), (async_sessionmaker(translated), Plain)):
        async with maker() as session:
            task = waiting(session, model, 1)
            await registered()
            await observer.execute('UPDATE "Other Shop"."order" SET status = status || $1', "!")
            assert (await task).status.endswith("!")


class Percent(Reserved.__base__):  # type: ignore[misc,name-defined]
    """Names that a driver of another kind would take for parameters."""

    __table__ = Table(
        "50%(of) %s",
        MetaData(),
        Column("100%", Integer, primary_key=True, key="id"),
        Column("a%d:b", Reserved.status.type, key="status"),
    )


async def test_names_may_have_percent_signs(engine: AsyncEngine, session_maker: SessionMaker) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Percent.__table__.create)
    try:
        async with session_maker() as session, session_maker() as other:
            other.add(changed := Percent(id=1, status="pending"))
            await other.commit()
            task = waiting(session, Percent, 1, columns=["status"])
            await registered()
            changed.status = "done"
            await other.commit()
            assert (await task).status == "done"
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Percent.__table__.drop)


class Plain(Reserved.__base__):  # type: ignore[misc,name-defined]
    """`Reserved` as a tenant's schema would have it."""

    __table__ = Table(
        "order", MetaData(), Column("id", Integer, primary_key=True), Column("status", Reserved.status.type)
    )


async def test_a_session_bound_to_one_connection_waits_through_it(engine: AsyncEngine) -> None:
    """The fixture that rolls every test back."""
    async with engine.connect() as connection, connection.begin() as outer:
        await connection.execute(text("INSERT INTO users VALUES (1, 'before')"))
        for mode in ("create_savepoint", "conditional_savepoint"):
            maker = async_sessionmaker(connection, expire_on_commit=False, join_transaction_mode=mode)
            async with maker() as session:
                mine = User(id=2 if mode == "create_savepoint" else 3, name="mine")
                session.add(mine)
                await session.flush()
                with pytest.raises(UncommittedChangesError):
                    await wait_for_row_change(session, User, 1, timeout=1)
                await session.commit()
                await session.execute(select(User))
                task = waiting(session, User, 1)
                await registered()
                async with maker() as other:
                    await other.execute(update(User).where(User.id == 1).values(name=mode))
                    await other.commit()
                assert (await task).name == mode
        assert await connection.scalar(text("SELECT count(*) FROM users")) == 3
        await outer.rollback()


async def test_a_key_of_the_wrong_kind_harms_nobody_else(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async with session_maker() as session, session_maker() as wrong, session_maker() as huge:
        task = waiting(session, User, user)
        failing = [waiting(wrong, User, "seven"), waiting(huge, User, 10**20)]
        results = await asyncio.gather(*failing, return_exceptions=True)
        assert all("query argument" in str(error) for error in results)
        await observer.execute("UPDATE users SET name = 'after'")
        assert (await task).name == "after"


async def test_a_key_of_the_wrong_kind_leaves_no_lock(single: AsyncEngine, observer: Connection, user: int) -> None:
    """asyncpg tells PostgreSQL that a statement is over when it has sent its values, which it cannot here.

    But for the first time, when it asks what an array is in between.
    """
    async with async_sessionmaker(single)() as session:
        await wait_for_row_change(session, User, user, columns=[User.name], since={"name": "another"})
        with pytest.raises(DBAPIError, match="query argument"):
            await wait_for_row_change(session, User, "seven", columns=[User.id])
        assert await observer.fetchval("SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass") == 0


@pytest.mark.parametrize("how", ["anyio", "task"])
async def test_a_cancelled_wait_leaves_nothing(
    session_maker: SessionMaker, engine: AsyncEngine, user: int, how: str
) -> None:
    async with session_maker() as session:
        if how == "anyio":
            with anyio.move_on_after(0.1):
                await wait_for_row_change(session, User, user)
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(wait_for_row_change(session, User, user), 0.1)
        # A shared read that was under way ends, with nobody to tell.
        await all_given_back(engine, within=2)


@pytest.mark.parametrize("written", [False, True])
async def test_a_wait_that_is_cancelled_as_it_begins_leaves_a_session_that_can_commit(
    database_url: str, observer: Connection, user: int, written: bool
) -> None:
    """A request whose wait ends as its server stops is answered, and what it has written is not lost in silence."""

    def slowly(_1: Any, _2: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return statement.replace("SELECT pg_current", "SELECT pg_sleep(0.3) IS NULL OR pg_current"), parameters

    async with engine_at(database_url) as engine, AsyncSession(engine, expire_on_commit=False) as session:
        event.listen(engine.sync_engine, "before_cursor_execute", slowly, retval=True)
        row = await session.get_one(User, user)
        if written:
            await session.execute(text("UPDATE users SET name = 'written'"))
        wait = waiting(session, User, user)
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        await eventually(lambda: observer.fetchval(asleep))
        wait.cancel()
        await asyncio.wait([wait])
        assert wait.cancelled()
        await session.commit()
        assert row.name == "before"
    assert await observer.fetchval("SELECT name FROM users") == ("written" if written else "before")


@pytest.mark.usefixtures("nobody_left_waiting")
async def test_a_cancelled_wait_lets_its_own_read_give_its_connection_back(database_url: str, user: int) -> None:
    """SQLAlchemy logs an error with a traceback for a connection whose closing is cancelled."""
    closing = HeldClosing()
    reading: list[object] = []

    def on_execute(connection: Any, _1: Any, statement: str, *_: Any) -> None:
        if "users.name" in statement:
            reading.append(connection.connection.driver_connection)

    def on_close(connection: Any, _: Any) -> None:
        if connection.driver_connection in reading:
            connection.run_async(closing)

    async with engine_at(database_url, poolclass=NullPool) as engine, AsyncSession(engine) as session:
        event.listen(engine.sync_engine, "before_cursor_execute", on_execute)
        event.listen(engine.sync_engine, "close", on_close)
        wait = waiting(session, User, user)
        await closing.begun.wait()
        wait.cancel()
        await iterations()
        closing.go.set()
        await asyncio.wait([wait])
    assert not closing.cancelled


async def asynchronous(_row: User) -> bool:
    return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["colour"]}, "colour is not a column of User; its columns are id, name"),
        ({"columns": [Item.number]}, "is not a column of User"),
        ({"columns": []}, "at least one attribute"),
        ({"columns": "name"}, "at least one attribute"),
        ({"model": "User"}, "is not a mapped class"),
        ({"model": aliased(User)}, "is not a mapped class"),
        ({"pk_value": (1, 2)}, "does not give the key of User"),
        ({"pk_value": None}, "does not give the key of User"),
        ({"pk_value": {"name": 1}}, "the key of User is"),
        ({"interval": 0}, "more than 0"),
        ({"interval": -1}, "0 or more"),
        ({"timeout": math.nan}, "finite"),
        ({"timeout": -0.1}, "0 or more"),
        ({"timeout": 10**400}, "finite"),
        ({"until": asynchronous}, "plain function"),
        ({"since": {"colour": 1}}, "not watched"),
        ({"since": Item(id=1)}, "a mapping or a User"),
    ],
)
async def test_bad_input_is_refused_at_once(
    session_maker: SessionMaker, user: int, arguments: dict[str, Any], message: str
) -> None:
    async with session_maker() as session:
        await session.execute(select(User))
        with pytest.raises(ValueError, match=message):
            await wait_for_row_change(session, **{"model": User, "pk_value": user, "timeout": 1, **arguments})
        assert session.in_transaction()


async def test_an_engine_that_is_not_asyncpg_is_refused() -> None:
    async with async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))() as session:
        with pytest.raises(ValueError, match=r"postgresql\+asyncpg"):
            await wait_for_row_change(session, User, 1)


async def test_watching_yields_the_row_now_and_its_newest_state_after_each_change(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async with session_maker() as session:
        async with watch_row(session, User, user, interval=0.05) as states:
            assert (await anext(states)).name == "before"
            await observer.execute("UPDATE users SET name = 'first'")
            assert (await anext(states)).name == "first"
            await observer.execute("UPDATE users SET name = 'second'")
            await observer.execute("UPDATE users SET name = 'third'")
            newest = await anext(states)
            while newest.name != "third":  # changes close together may come as one; the last one always comes
                newest = await anext(states)
            assert newest in session
            await observer.execute("DELETE FROM users")
            with pytest.raises(RowNotFoundError, match="was deleted"):
                await anext(states)


async def test_watching_since_what_the_caller_has_seen(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async with session_maker() as session:
        async with watch_row(session, User, user, since={"id": 1, "name": "before"}, interval=0.05) as states:
            task = asyncio.ensure_future(anext(states))
            await registered()
            assert not task.done()
            await observer.execute("UPDATE users SET name = 'after'")
            assert (await task).name == "after"
        async with watch_row(session, User, user, since={"name": "older"}, timeout=0.2, interval=0.05) as states:
            assert (await anext(states)).name == "after"
            with pytest.raises(WaitTimeoutError):
                await anext(states)


async def test_watching_yields_no_state_that_was_the_last_one(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    """Though the row was another one meanwhile, and was read as such."""
    async with session_maker() as session, watch_row(session, User, user, interval=0.02, timeout=0.2) as states:
        assert (await anext(states)).name == "before"
        (waiter,) = waiters()
        for name in ("another", "before"):
            await observer.execute("UPDATE users SET name = $1", name)
            reads = waiter._poller.generation
            await eventually(lambda reads=reads: waiter._poller.generation > reads + 1)
        with pytest.raises(WaitTimeoutError):
            await anext(states)


async def test_watching_never_goes_backwards_and_holds_no_connection(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection
) -> None:
    await observer.execute("INSERT INTO accounts VALUES ('eu', 7, 'open', 0, 1)")

    async def change() -> None:
        for version in range(2, 101):
            await observer.execute("UPDATE accounts SET version = $1", version)

    seen: list[int] = []
    async with session_maker() as session, watch_row(session, Account, ("eu", 7), interval=0.01) as states:
        changing = asyncio.create_task(change())
        async for account in states:
            seen.append(account.version)
            await session.execute(select(User))  # the next step ends what this has begun
            if account.version == 100:
                break
        await changing
    assert seen == sorted(set(seen))
    assert seen[-1] == 100
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_watching_refuses_what_could_never_end(session_maker: SessionMaker, user: int) -> None:
    async with session_maker() as session, watch_row(session, User, user) as states:
        row = await anext(states)
        row.name = "mine"
        await session.flush()
        with pytest.raises(UncommittedChangesError):
            await anext(states)


DOCUMENT = UUID("6f1f5a0c-0000-4000-8000-000000000001")


@pytest.fixture
async def document(tables: None, observer: Connection) -> UUID:
    await observer.execute("INSERT INTO users VALUES (1, 'one'), (2, 'two')")
    await observer.execute("""INSERT INTO documents VALUES ($1, '{"n": 1}', 1, 1, 'NaN', 1)""", DOCUMENT)
    return DOCUMENT


@pytest.mark.parametrize("pending", [False, True])
async def test_the_sessions_own_instance_is_current_in_all_its_parts(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection, document: UUID, pending: bool
) -> None:
    async with session_maker() as session:
        own = await session.get(Document, document)
        assert own is not None
        assert own.place == Point(1, 1)
        assert own.owner is not None
        if pending:
            own.weight = 7.0
        task = waiting(session, Document, document, columns=[Document.x])
        await registered()
        await observer.execute("""UPDATE documents SET x = 5, y = 6, owner_id = 2, body = '{"n": 2}'""")
        assert await task is own
        await all_given_back(engine)
        assert own.place == Point(5, 6)
        assert own.owner.name == "two"
        own.body["n"] += 1
        await session.commit()
    row = await observer.fetchrow("SELECT body ->> 'n' AS n, weight FROM documents")
    assert row["n"] == "3"
    assert row["weight"] == 7.0 if pending else math.isnan(row["weight"])


async def test_a_row_is_the_same_by_any_spelling_of_its_key_and_not_a_number_is_no_change(
    session_maker: SessionMaker, observer: Connection, document: UUID
) -> None:
    async with session_maker() as session:
        own = await session.get(Document, document)
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, Document, str(document), timeout=0.2, interval=0.05)
        await observer.execute("UPDATE documents SET x = 5")
        assert await wait_for_row_change(session, Document, str(document), interval=60, timeout=5) is own


async def test_watching_does_not_see_what_its_caller_changes_in_place(
    session_maker: SessionMaker, document: UUID
) -> None:
    async with session_maker() as session, watch_row(session, Document, document, interval=0.05, timeout=0.2) as states:
        row = await anext(states)
        row.body["seen"] = True
        with pytest.raises(WaitTimeoutError):
            await anext(states)


async def test_several_waits_for_one_row_share_nothing_that_can_change(
    session_maker: SessionMaker, observer: Connection, document: UUID
) -> None:
    async with session_maker() as one, session_maker() as two:
        tasks = [waiting(session, Document, document) for session in (one, two)]
        await registered()
        await observer.execute("UPDATE documents SET x = 5")
        first, second = await asyncio.gather(*tasks)
        first.body["n"] = 100
        assert second.body == {"n": 1}
        assert first is not second


async def test_a_wait_cancelled_while_it_ends_a_transaction_is_cancelled_and_nothing_else(
    session_maker: SessionMaker, user: int
) -> None:
    for n in range(60):
        async with session_maker() as session:
            await session.execute(select(User))
            task = waiting(session, User, user)
            for _ in range(n % 12):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_session_that_began_the_transaction_of_its_connection(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        async with AsyncSession(connection) as session:
            await session.execute(text("INSERT INTO users VALUES (9, 'mine')"))
            with pytest.raises(UncommittedChangesError):
                await wait_for_row_change(session, User, 9, timeout=1)
            await session.rollback()
        async with connection.begin() as outer:
            maker = async_sessionmaker(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
            async with maker() as session:
                await session.execute(text("INSERT INTO users VALUES (9, 'mine')"))
                async with get_transaction(session):
                    await session.execute(select(User))
                    with pytest.raises(UncommittedChangesError):
                        await wait_for_row_change(session, User, 9, timeout=1)
            await outer.rollback()


async def test_a_row_that_never_rests_ends_an_until_by_its_deadline(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async def change() -> None:
        n = 0
        while True:
            n += 1
            await observer.execute("UPDATE users SET name = $1", str(n))

    changing = asyncio.create_task(change())
    async with session_maker() as session:
        began = time.monotonic()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(
                session, User, user, until=lambda row: row.name == "never", interval=0.001, timeout=0.3
            )
        assert time.monotonic() - began < 1.3
    changing.cancel()
    await asyncio.wait([changing])


async def test_a_row_that_was_changed_and_is_kept_where_it_was_before_is_a_change(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    """PostgreSQL uses the place of an outdated version again as soon as nobody can see that any more."""
    change = "UPDATE users SET name = name || '.' WHERE id = $1 RETURNING ctid"
    await observer.execute("VACUUM users")  # so that the first place is free, which is used again before all others
    before = await observer.fetchval(change, user)
    async with session_maker() as session:
        task = waiting(session, User, user, columns=[User.name], interval=60, timeout=3)
        await registered()
        for _ in range(10):
            await observer.execute("VACUUM users")
            if await observer.fetchval(change, user) == before:
                break
        else:
            raise AssertionError("it has not come back to its place")
        assert "." in (await task).name


async def test_watching_never_goes_behind_what_its_caller_has_read(
    session_maker: SessionMaker, observer: Connection, user: int
) -> None:
    async with session_maker() as session, watch_row(session, User, user, interval=0.02) as states:
        row = await anext(states)
        await observer.execute("UPDATE users SET name = 'older'")
        group = next(iter(Watcher.of(session_maker.kw["bind"])._pollers.values()))
        (waiter,) = group.waiters[user,]
        await eventually(lambda: getattr(waiter, "due", True) and getattr(waiter, "row", True))
        await observer.execute("UPDATE users SET name = 'newest'")
        await session.refresh(row)
        assert row.name == "newest"
        assert (await anext(states)).name == "newest"
