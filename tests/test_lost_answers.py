"""An answer of PostgreSQL that was lost on its way: who waits for it is told, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import event, func, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

import coord.database.lost_answers
from coord import Coordinator, job_transaction, lock_tables
from coord.retryable import is_retryable
from tests.faults.faults import at_commit
from tests.models import Item, User
from tests.proxy import Proxy
from tests.serving import eventually
from tests.shop import dsn_of, waiting_for_locks
from tests.workers import fragile_postgresql, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import Session

    from coord import Job
    from tests.proxy import Wire
    from tests.workers import Office

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tables")]

WITHIN = 10.0
"""Seconds from the loss until the job has run again."""
EFFECT = text("INSERT INTO effects (job, attempt) VALUES (:job, :attempt)")
PID = text("SELECT pg_backend_pid()")
PORT = text("SELECT client_port FROM pg_stat_activity WHERE pid = pg_backend_pid()")
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'watched'"
KEY_DATA = b"K\x00\x00\x00\x0c"
"""What begins the message by which a server says its backend's number (section 54.7 of PostgreSQL's manual)."""


@pytest.fixture
async def way(office: Office) -> AsyncIterator[Proxy]:
    async with Proxy(office.database_url).opened() as way:
        yield way


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what lasts two and a half seconds is far beyond it."""
    monkeypatch.setattr(coord.database.lost_answers, "ANSWER_SECONDS", 1.0)


LONG = 2.5


def lose(way: Proxy) -> None:
    """All that is under way, for good; who connects from now on is served."""
    way.lose_everything()
    way.lead_again()


def is_dead(wire: Wire) -> None:
    wire.is_dead = True


async def apply(session: AsyncSession, ctx: dict[str, Any]) -> None:
    await session.execute(EFFECT, {"job": ctx["job_id"], "attempt": ctx["job_try"]})


class Held:
    """A task whose first attempt stands still inside its transaction, with a table locked, until it is let go."""

    def __init__(self) -> None:
        self.inside, self.go = asyncio.Event(), asyncio.Event()
        self.port = 0

    async def task(self, ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [User]):
            await apply(session, ctx)
            if ctx["job_try"] == 1:
                self.port = (await session.execute(PORT)).one().client_port
                self.inside.set()
                await self.go.wait()
                await session.execute(text("SELECT 1"))


async def applied_again(office: Office, job: Job) -> None:
    """Once, by the second attempt."""
    row = await office.final(job, within=WITHIN)
    assert (row.state, row.attempt) == ("done", 2)
    assert await office.effects(job) == [2]


async def test_a_job_whose_statement_was_answered_in_vain_runs_again(
    office: Office, way: Proxy, observer: Connection
) -> None:
    """It waited for a lock as the link was lost, got it, and kept it from everybody else."""

    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [User]):
            await apply(session, ctx)

    async with working(office, [task], database_url=way.url):
        async with observer.transaction():
            await observer.execute("LOCK TABLE users IN EXCLUSIVE MODE")
            job = await office.enqueue(task)
            await eventually(lambda: _waits(observer))
            lose(way)
        await applied_again(office, job)


async def _waits(observer: Connection) -> bool:
    return await waiting_for_locks(observer) == 1


async def test_a_statement_that_was_parsed_in_vain_is_told_of(office: Office, way: Proxy, observer: Connection) -> None:
    """A new one is parsed before its values are sent, which waits for a lock of its table; nobody is idle meanwhile."""
    engine = create_async_engine(way.url)
    async with Coordinator(async_sessionmaker(engine)), AsyncSession(engine) as session:
        async with observer.transaction():
            await observer.execute("LOCK TABLE users IN EXCLUSIVE MODE")
            late = asyncio.create_task(session.execute(text("INSERT INTO users (id) VALUES (:id)"), {"id": 1}))
            await eventually(lambda: _waits(observer))
            lose(way)
        async with asyncio.timeout(WITHIN):
            with pytest.raises(DBAPIError):
                await late
        async with observer.transaction():
            await observer.execute("LOCK TABLE users IN EXCLUSIVE MODE NOWAIT")
    await engine.dispose()


async def test_what_a_session_had_locked_is_free_again(office: Office, way: Proxy, observer: Connection) -> None:
    """Also of a process that is no worker: nobody else would know that its client was cut off."""
    engine = create_async_engine(way.url)
    async with Coordinator(async_sessionmaker(engine)), AsyncSession(engine) as session:
        await session.execute(text("LOCK TABLE users IN EXCLUSIVE MODE"))
        lose(way)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1"))
        async with observer.transaction():
            await observer.execute("LOCK TABLE users IN EXCLUSIVE MODE NOWAIT")
    await engine.dispose()


@pytest.mark.parametrize("statement", [b"client_connection_check_interval", b"BEGIN", b"pg_postmaster_start_time"])
async def test_a_connection_that_is_lost_while_it_is_made_is_given_up(
    office: Office, way: Proxy, statement: bytes
) -> None:
    """No statement of a session is on it yet."""

    def lose_it(wire: Wire, data: bytes) -> bool:
        wire.is_dead = statement in data
        return wire.is_dead

    engine = create_async_engine(way.url)
    async with engine.connect():
        pass  # what SQLAlchemy asks the first connection of all, nobody watches
    await engine.dispose()
    async with Coordinator(async_sessionmaker(engine)), asyncio.timeout(WITHIN):
        way.on_request = lose_it
        with pytest.raises(DBAPIError) as caught:
            async with AsyncSession(engine) as session:
                await session.execute(text("SELECT 1"))
        assert is_retryable(caught.value)
        way.on_request = None
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 1"))
    await engine.dispose()


async def test_a_job_whose_statement_never_arrived_runs_again(office: Office, way: Proxy) -> None:
    """The task was busy elsewhere as the link was lost, and its transaction had a table locked."""
    held = Held()
    async with working(office, [held.task], database_url=way.url):
        job = await office.enqueue(held.task)
        await held.inside.wait()
        lose(way)
        held.go.set()
        await applied_again(office, job)


async def test_a_job_whose_commit_never_arrived_runs_again(office: Office, way: Proxy) -> None:
    held = Held()
    async with working(office, [held.task], database_url=way.url):
        job = await office.enqueue(held.task)
        await held.inside.wait()
        at_commit(way, is_dead, arrives=False, port=held.port)
        held.go.set()
        await applied_again(office, job)


async def test_a_job_whose_commit_was_answered_in_vain_is_done_and_its_worker_goes_on(
    office: Office, way: Proxy
) -> None:
    held = Held()
    async with working(office, [held.task], database_url=way.url, max_jobs=1):
        job = await office.enqueue(held.task)
        await held.inside.wait()
        at_commit(way, is_dead, arrives=True, port=held.port)
        held.go.set()
        row = await office.final(job)
        assert (row.state, row.attempt) == ("done", 1)
        assert (await office.final(await office.enqueue(held.task), within=WITHIN)).state == "done"
    assert await office.effects(job) == [1]


@pytest.mark.parametrize("pings", [False, True])
async def test_a_job_that_begins_on_a_dead_connection_uses_up_no_attempt(
    office: Office, way: Proxy, pings: bool
) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await apply(session, ctx)

    pool = {"pool_size": 1, "max_overflow": 0, "pool_pre_ping": pings}
    async with working(office, [task], database_url=way.url, engine=pool):
        await office.final(await office.enqueue(task))
        lose(way)
        job = await office.enqueue(task)
        row = await office.final(job, within=WITHIN)
    assert (row.state, row.attempt) == ("done", 1)
    assert await office.effects(job) == [1]


async def test_the_end_of_an_attempt_that_is_written_on_a_dead_connection_is_written_again(
    office: Office, way: Proxy
) -> None:
    async def task(ctx: dict[str, Any]) -> str:
        return "done"

    async with working(office, [task], database_url=way.url, engine={"pool_size": 1, "max_overflow": 0}):
        await office.final(await office.enqueue(task))
        lose(way)
        row = await office.final(await office.enqueue(task), within=WITHIN)
    assert (row.state, row.attempt, row.result) == ("done", 1, "done")


async def test_a_session_of_a_coordinated_engine_is_told_and_the_next_one_has_a_new_connection(
    office: Office, way: Proxy
) -> None:
    engine = create_async_engine(way.url, pool_size=3)
    async with Coordinator(async_sessionmaker(engine)):
        for session in [AsyncSession(engine) for _ in range(3)]:
            async with session:
                await session.execute(text("SELECT 1"))
        lose(way)
        began = time.monotonic()
        with pytest.raises(DBAPIError) as caught:
            async with AsyncSession(engine) as session:
                await session.execute(text("SELECT 1"))
        assert is_retryable(caught.value)
        assert caught.value.connection_invalidated
        assert time.monotonic() - began < WITHIN
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 1"))
    await engine.dispose()


async def test_a_connection_of_the_pool_that_is_pinged_in_vain_is_replaced(office: Office, way: Proxy) -> None:
    engine = create_async_engine(way.url, pool_size=1, max_overflow=0, pool_pre_ping=True)
    async with Coordinator(async_sessionmaker(engine)), asyncio.timeout(WITHIN):
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 1"))
        lose(way)
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 1"))
    await engine.dispose()


@contextlib.asynccontextmanager
async def watched(office: Office) -> AsyncIterator[AsyncEngine]:
    named = {"server_settings": {"application_name": "watched"}}
    engine = create_async_engine(office.database_url, pool_size=1, max_overflow=0, connect_args=named)
    async with Coordinator(async_sessionmaker(engine)):
        yield engine
    await engine.dispose()


async def test_nothing_connects_unless_an_answer_is_late(office: Office, observer: Connection) -> None:
    async with watched(office) as engine, AsyncSession(engine) as session:
        late = asyncio.create_task(session.execute(text("SELECT pg_sleep(6)")))
        await asyncio.sleep(2)
        assert await observer.fetchval(CONNECTIONS) == 1
        await late
        assert await observer.fetchval(CONNECTIONS) == 2
        await eventually(lambda: _is(observer, CONNECTIONS, 1))


async def _is(observer: Connection, statement: str, value: int) -> bool:
    return bool(await observer.fetchval(statement) == value)


@pytest.mark.usefixtures("quick")
async def test_what_only_takes_long_is_not_disturbed(
    office: Office, way: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A long statement, a lock that is waited for, and a task that does something else inside its transaction, also
    after an error of its own."""

    async def statement(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": LONG})

    async def another(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await session.execute(text("SELECT 1"))
            await asyncio.sleep(LONG)

    async def refused(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            try:
                await session.execute(text("INSERT INTO users (name) VALUES (NULL)"))
            finally:
                await asyncio.sleep(LONG)

    async def locks(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [User], timeout=30):
            await asyncio.sleep(LONG)

    async with working(office, [statement, another, refused, locks], database_url=way.url):
        jobs = [await office.enqueue(task) for task in (statement, another, refused, locks, locks)]
        rows = [await office.final(job, within=20) for job in jobs]
    assert [row.state for row in rows] == ["done", "done", "failed", "done", "done"]
    assert {row.attempt for row in rows} == {1}
    assert "was lost" not in caplog.text


@pytest.mark.usefixtures("quick")
async def test_who_has_committed_and_keeps_the_connection_is_not_disturbed(office: Office) -> None:
    """Also by what the pool has asked when it gave it out."""
    engine = create_async_engine(office.database_url, pool_size=1, max_overflow=0, pool_pre_ping=True)
    async with Coordinator(async_sessionmaker(engine)):
        for _ in range(2):
            async with engine.connect() as connection:
                pid = await connection.scalar(PID)
                await connection.commit()
                await asyncio.sleep(LONG)
                assert await connection.scalar(PID) == pid
    await engine.dispose()


@pytest.mark.usefixtures("quick")
async def test_what_has_come_to_a_loop_that_was_blocked_is_read_before_it_counts_as_lost(
    office: Office, observer: Connection
) -> None:
    async with watched(office) as engine, AsyncSession(engine) as session:
        late = asyncio.create_task(session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": 2 * LONG}))
        await asyncio.sleep(0.2)
        time.sleep(2 * LONG - 1)  # noqa: ASYNC251 - what is tried
        await late
        assert await observer.fetchval(CONNECTIONS) == 1


@contextlib.asynccontextmanager
async def left_alone(way: Proxy, caplog: pytest.LogCaptureFixture) -> AsyncIterator[AsyncSession]:
    """Whose one connection is not closed in the block."""
    engine = create_async_engine(way.url, pool_size=1, max_overflow=0)
    async with Coordinator(async_sessionmaker(engine)), AsyncSession(engine) as session:
        yield session
    await engine.dispose()
    assert "was lost" not in caplog.text


@pytest.mark.usefixtures("quick")
async def test_an_answer_that_is_only_late_is_not_lost(
    office: Office, way: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """To a statement that has taken long as well; whoever looks is answered at once."""
    async with left_alone(way, caplog) as session:
        port = (await session.execute(PORT)).one().client_port

        def late(wire: Wire, data: bytes) -> bool:
            if wire.port == port:
                asyncio.get_running_loop().call_later(0.6, wire.client.write, data)
            return bool(wire.port == port)

        way.on_answer = late
        await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": LONG})
        await session.commit()
        way.on_answer = None


@pytest.mark.usefixtures("quick")
async def test_a_statement_whose_values_a_slow_link_takes_long_to_carry_is_not_lost(
    office: Office, way: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL does nothing meanwhile: it begins when it has all of them."""
    loop, free = asyncio.get_running_loop(), dict[Any, float]()

    def slowly(wire: Wire, data: bytes) -> bool:
        """A megabyte a second."""
        free[wire] = max(free.get(wire, 0.0), loop.time()) + len(data) / 1e6
        loop.call_at(free[wire], wire.server.write, data)
        return True

    async with left_alone(way, caplog) as session:
        way.on_request = slowly
        for size in (1, int(LONG * 1e6)):  # of a new statement the second is sent when it is parsed
            assert await session.scalar(text("SELECT length(:it)"), {"it": "x" * size}) == size
        await session.commit()
        way.on_request = None


@pytest.mark.usefixtures("quick")
async def test_where_an_address_leads_to_several_servers_nobody_else_is_asked(
    office: Office, way: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one has no such backend, or one that is somebody else's."""
    name = make_url(way.url).database
    with fragile_postgresql() as other:
        there = await asyncpg.connect(dsn_of(other.url))
        await there.execute(f'CREATE DATABASE "{name}"')
        async with left_alone(way, caplog) as session:
            await session.execute(text("SELECT 1"))
            way.target = make_url(other.url)
            late = asyncio.create_task(session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": LONG}))
            asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND query = 'COMMIT;'"
            await eventually(lambda: there.fetchval(asked, name))
            await late
        await there.close()


@pytest.mark.usefixtures("quick")
async def test_behind_a_pooler_which_makes_up_the_numbers_of_backends_nothing_is_done(
    office: Office, way: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    numbers: list[int] = []

    def made_up(wire: Wire, data: bytes) -> bool:
        start = data.find(KEY_DATA)
        if start < 0:
            return False
        numbers.append(int.from_bytes(data[start + 5 : start + 9]))
        wire.client.write(data[: start + 5] + struct.pack("!i", 2**31 - len(numbers)) + data[start + 9 :])
        return True

    way.on_answer = made_up
    async with left_alone(way, caplog) as session:
        await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": LONG})
    assert len(numbers) == 2  # it has looked


async def test_who_may_not_ask_since_when_the_server_serves_connects_all_the_same(
    office: Office, observer: Connection
) -> None:
    """On a database whose functions were taken from everybody nothing is watched."""
    may = "ON FUNCTION pg_postmaster_start_time()"
    await observer.execute(f"CREATE ROLE nobody LOGIN; REVOKE EXECUTE {may} FROM PUBLIC")
    engine = create_async_engine(make_url(office.database_url).set(username="nobody"))
    try:
        async with Coordinator(async_sessionmaker(engine)), AsyncSession(engine) as session:
            assert await session.scalar(text("SELECT current_user")) == "nobody"
    finally:
        await engine.dispose()
        await observer.execute(f"DROP ROLE nobody; GRANT EXECUTE {may} TO PUBLIC")


@pytest.mark.usefixtures("quick")
async def test_an_error_that_a_listener_of_the_applications_makes_another_of_is_waited_for_by_nobody(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """It raises, and so keeps others from being told; the statement has ended with the call all the same."""
    engine = create_async_engine(office.database_url, pool_size=1, max_overflow=0)

    def translate(_context: Any) -> None:
        raise LookupError("as the application calls it")

    event.listen(engine.sync_engine, "handle_error", translate)
    async with Coordinator(async_sessionmaker(engine)), AsyncSession(engine) as session:
        pid = await session.scalar(PID)
        with pytest.raises(LookupError):
            await session.execute(text("SELECT CAST('x' AS int)"))
        await asyncio.sleep(LONG)
        await session.rollback()
        assert await session.scalar(PID) == pid
    await engine.dispose()
    assert "was lost" not in caplog.text


@pytest.mark.usefixtures("quick")
async def test_what_another_role_waits_for_long_is_not_lost(
    office: Office, observer: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Where an application's name changes from time to time, who asks may not see what an older connection does."""
    await observer.execute("CREATE ROLE later LOGIN")
    engine = create_async_engine(office.database_url, pool_size=1, max_overflow=0)
    made = 0

    def as_now(_dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
        nonlocal made
        made += 1
        if made > 1:
            parameters["user"] = "later"

    event.listen(engine.sync_engine, "do_connect", as_now)
    try:
        async with Coordinator(async_sessionmaker(engine)), AsyncSession(engine) as session:
            await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": LONG})
    finally:
        await engine.dispose()
        await observer.execute("DROP ROLE later")
    assert made > 1, "somebody has asked"
    assert "was lost" not in caplog.text


# Sessions that have several engines


@contextlib.asynccontextmanager
async def on_two_engines(office: Office, caplog: pytest.LogCaptureFixture) -> AsyncIterator[AsyncSession]:
    """Users by one and items by the other; no connection of either is closed in the block."""
    users, items = (create_async_engine(office.database_url, pool_size=1, max_overflow=0) for _ in range(2))
    maker = async_sessionmaker(binds={User: users, Item: items}, expire_on_commit=False)
    async with Coordinator(maker), maker() as session:
        yield session
    await users.dispose()
    await items.dispose()
    assert "was lost" not in caplog.text


@pytest.mark.usefixtures("quick")
async def test_what_a_session_has_of_one_engine_is_not_lost_while_its_flush_waits_at_another(
    office: Office, observer: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Read from one, as from a replica; and what the commit flushes to the other waits for a table that is locked."""
    async with on_two_engines(office, caplog) as session:
        assert (await session.scalars(select(Item))).all() == []
        session.add(User(id=1))
        async with observer.transaction():
            await observer.execute("LOCK TABLE users IN EXCLUSIVE MODE")
            commit = asyncio.create_task(session.commit())
            await asyncio.sleep(LONG)
        await commit
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


def write_and_ask(session: Session) -> None:
    """As a query does that flushes first."""
    session.flush()
    session.execute(select(func.pg_sleep(LONG)), bind_arguments={"mapper": Item})


@pytest.mark.usefixtures("quick")
async def test_what_a_session_has_written_is_not_lost_while_it_asks_another_engine_in_the_same_call(
    office: Office, observer: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with on_two_engines(office, caplog) as session:
        session.add(User(id=1))
        await session.run_sync(write_and_ask)
        await session.commit()
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


SLOW_COMMIT = """
    CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2.5); RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION take_long();
    CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION take_long();
"""


@pytest.mark.usefixtures("quick")
async def test_of_two_commits_of_a_session_the_second_is_not_lost_while_the_first_takes_long(
    office: Office, observer: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    await observer.execute(SLOW_COMMIT)
    try:
        async with on_two_engines(office, caplog) as session:
            session.add_all([User(id=1), Item(id=1)])
            await session.commit()
    finally:
        await observer.execute("DROP FUNCTION take_long CASCADE")
    assert await observer.fetchval("SELECT count(*) FROM users NATURAL JOIN items") == 1
