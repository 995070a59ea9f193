"""The coordinator: waits are woken after the commit, by nothing else, and go on without it."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
import tracemalloc
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis
from sqlalchemy import delete, event, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

import coord.waiting.watcher
from coord import Coordinator, TooManyWaitersError, WaitTimeoutError, wait_for_row_change
from coord.database.target import mapper_of
from coord.dev.embedded import PostgreSQL, Valkey
from coord.notify.channels import MAX_ROWS_PER_TABLE, Channels
from coord.observation import Observer, observers
from tests.clusters import lay
from tests.models import Account, Base, Item, User
from tests.proxy import Proxy
from tests.serving import all_given_back, engine_at, eventually, served
from tests.waits import HeldClosing, iterations, registered, waiters, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "nobody_left_waiting")

NEVER = 60.0
"""An interval that no test lives to see."""


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def users(tables: None, observer: Connection) -> None:
    await observer.execute("INSERT INTO users SELECT n, 'before' FROM generate_series(1, 500) AS n")


class Published:
    """What is published, by anybody."""

    def __init__(self) -> None:
        self.channels: list[str] = []

    async def has(self, count: int) -> list[str]:
        await eventually(lambda: len(self.channels) >= count)
        return sorted(self.channels)


@asynccontextmanager
async def subscribed(redis: Redis) -> AsyncIterator[Published]:
    published = Published()
    subscription = redis.pubsub()
    await subscription.psubscribe("*")
    await subscription.get_message(timeout=5)

    async def listen() -> None:
        async for message in subscription.listen():
            published.channels.append(message["channel"].decode().split(":", 2)[2])

    task = asyncio.create_task(listen())
    try:
        yield published
    finally:
        task.cancel()
        await asyncio.wait([task])
        await subscription.aclose()  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("users")
async def test_a_commit_wakes_the_wait(coordinator: Coordinator, session_maker: SessionMaker) -> None:
    async with session_maker() as session, session_maker() as writer:
        task = waiting(session, User, 1, interval=NEVER)
        await registered()
        user = await writer.get(User, 1)
        assert user is not None
        user.name = "after"
        await writer.commit()
        async with asyncio.timeout(1):
            assert (await task).name == "after"


@pytest.mark.usefixtures("users")
async def test_a_change_before_a_slow_redis_has_subscribed_is_seen_once_it_has(
    session_maker: SessionMaker, redis_url: str, redis: Redis, observer: Connection
) -> None:
    """The row was read when that had taken too long, and its message came before it was done."""
    async with Proxy(redis_url).opened() as way:
        async with Coordinator(session_maker, redis=way.url, read_settings={}) as coordinator:
            await eventually(lambda: coordinator._bell and coordinator._bell.connected)
            way.flows.clear()
            async with session_maker() as session:
                task = waiting(session, User, 1, interval=NEVER, timeout=NEVER)
                await registered()
                await observer.execute("UPDATE users SET name = 'after' WHERE id = 1")
                assert await redis.publish(coordinator.channels.row(mapper_of(User), (), (1,)), b"") == 0
                way.flows.set()
                async with asyncio.timeout(5):
                    assert (await task).name == "after"


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("how", ["bulk", "raw"])
async def test_bulk_statements_ring_by_table_and_raw_sql_when_announced(
    coordinator: Coordinator, session_maker: SessionMaker, how: str
) -> None:
    async with session_maker() as session, session_maker() as writer:
        task = waiting(session, User, 7, interval=NEVER)
        await registered()
        if how == "bulk":
            await writer.execute(update(User).values(name="after").where(User.id == 7))
        else:
            await writer.execute(text("UPDATE users SET name = 'after' WHERE id = 7"))
            coordinator.ring(writer, User, 7)
        await writer.commit()
        async with asyncio.timeout(1):
            assert (await task).name == "after"


@pytest.mark.usefixtures("coordinator")
async def test_rows_ring_once_the_outermost_commit_is_done_and_not_before(
    session_maker: SessionMaker, redis: Redis
) -> None:
    async with subscribed(redis) as published, session_maker() as session:
        session.add(User(id=1))
        await session.flush()
        async with session.begin_nested():
            session.add(User(id=2))
        with pytest.raises(KeyError):
            async with session.begin_nested():
                session.add(User(id=3))
                await session.flush()
                async with session.begin_nested():
                    session.add(User(id=4))
                raise KeyError
        assert published.channels == []
        await session.commit()
        assert await published.has(2) == [".users:1", ".users:2"]
        session.add(User(id=5))
        await session.flush()
        await session.execute(delete(User))
        await session.rollback()
        await session.execute(delete(User))  # a transaction's first statement
        await redis.publish("coord::marker", b"")
        assert ".users" not in await published.has(3)
        await session.rollback()
        session.add(Account(region="eu", number=1))
        await session.commit()
        assert (await published.has(4))[0] == ".accounts:eu/1"
        assert len(published.channels) == 4


async def test_many_rows_of_one_table_ring_its_bell_instead(
    coordinator: Coordinator, session_maker: SessionMaker, redis: Redis
) -> None:
    async with subscribed(redis) as published, session_maker() as session:
        session.add_all(User(id=n) for n in range(1, MAX_ROWS_PER_TABLE + 2))
        session.add(Item(id=1))
        await session.commit()
        assert await published.has(2) == [".items:1", ".users"]
        coordinator.ring(session, User)
        await published.has(3)
        assert len(published.channels) == 3


@pytest.mark.usefixtures("coordinator")
async def test_of_many_rows_the_one_message_counts_as_one(session_maker: SessionMaker) -> None:
    class Counted(Observer):
        published = 0

        def hints(self, kind: str, count: int = 1) -> None:
            self.published += count * (kind == "published")

    counted = Counted()
    observers.append(counted)
    try:
        async with session_maker() as session:
            session.add_all(User(id=n) for n in range(1, MAX_ROWS_PER_TABLE + 2))
            session.add(Item(id=1))
            await session.commit()
        assert counted.published == 2
    finally:
        observers.remove(counted)


@pytest.mark.usefixtures("users", "coordinator")
async def test_a_class_that_is_waited_for_again_at_once_is_still_subscribed_to(
    session_maker: SessionMaker, redis: Redis
) -> None:
    """And no longer, when nobody has waited for it for half a second."""

    async def channels() -> set[str]:
        return {channel.decode().split(":", 2)[2] for channel in await redis.pubsub_channels()}

    async def wait_once(session: AsyncSession) -> None:
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, 1, timeout=0.05)

    async with session_maker() as session:
        await wait_once(session)
        await eventually(lambda: _equal(channels, {".users"}))  # the row's is left, and that was said
        await wait_once(session)
    await eventually(lambda: _equal(redis.pubsub_channels, []))


@pytest.mark.usefixtures("users", "coordinator")
async def test_a_process_hears_only_the_rows_it_waits_for(session_maker: SessionMaker, redis: Redis) -> None:
    async def channels() -> set[str]:
        return {channel.decode().split(":", 2)[2] for channel in await redis.pubsub_channels()}

    async with session_maker() as one, session_maker() as two:
        tasks = [waiting(one, User, 1, interval=NEVER), waiting(two, User, 2, interval=NEVER)]
        await eventually(lambda: _equal(channels, {".users", ".users:1", ".users:2"}))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await eventually(lambda: _equal(channels, set()))


async def _equal(actual: Any, expected: Any) -> bool:
    return bool(await actual() == expected)


@pytest.mark.usefixtures("users", "coordinator")
async def test_another_namespace_or_database_wakes_nobody(
    database_url: str, session_maker: SessionMaker, redis_url: str
) -> None:
    async with (
        engine_at(database_url) as other,
        Coordinator(async_sessionmaker(other), redis=redis_url, namespace="other"),
        session_maker() as session,
        AsyncSession(other) as writer,
    ):
        task = waiting(session, User, 1, interval=NEVER, timeout=2.0)
        await registered()
        await writer.execute(update(User).values(name="after"))
        await writer.commit()
        done, _ = await asyncio.wait([task], timeout=0.3)
        assert not done
        assert (await task).name == "after"  # the last look
    mapper = mapper_of(User)
    names = {Channels(namespace, database).table(mapper, ()) for namespace in "ab" for database in "cd"}
    assert len(names) == 4


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("bell", [True, False])
async def test_one_wait_too_many_is_refused_at_once(session_maker: SessionMaker, redis_url: str, bell: bool) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(Coordinator(session_maker, redis=redis_url if bell else None, max_waiters=2))
        sessions = [await stack.enter_async_context(session_maker()) for _ in range(3)]
        tasks = [waiting(session, User, 1) for session in sessions[:2]]
        await registered()
        with pytest.raises(TooManyWaitersError, match="2 waits are as many"):
            await wait_for_row_change(sessions[2], User, 1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(sessions[2], User, 1, timeout=0)


async def test_a_listener_that_fails_does_not_end_the_bell(
    session_maker: SessionMaker, redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    class Listener:
        messages = 0

        def subscribed(self) -> None: ...

        def on_message(self) -> None:
            self.messages += 1
            if self.messages == 1:
                raise LookupError("of the listener's")

    async def notified() -> bool:
        await redis.publish("a channel", "")
        return listener.messages > 1

    listener = Listener()
    async with Coordinator(session_maker, redis=redis_url) as coordinator:
        coordinator.listen(b"a channel", listener)
        await eventually(notified)
    assert "of the listener's" in caplog.text


async def test_what_redis_refuses_is_said_once_while_all_else_goes_on(
    session_maker: SessionMaker, redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Here a user without the right to any channel but one."""
    await redis.acl_setuser(
        "deaf", enabled=True, nopass=True, reset_channels=True, channels=["allowed"], commands=["+@all"]
    )
    try:
        async with Coordinator(session_maker, redis=redis_url.replace("//", "//deaf:any@")) as coordinator:
            bell = coordinator._bell
            assert bell is not None
            await eventually(lambda: bell.connected)
            for n in range(30):
                bell.publish([b"refused", b"allowed"] if n % 2 else [b"allowed"])
                await eventually(lambda: not bell.is_pending(b"allowed"))
    finally:
        await redis.acl_deluser("deaf")
    said = [record.message for record in caplog.records if record.name == "coord.bell"]
    assert len(said) == 1
    assert "permission" in said[0].lower()


async def test_it_closes_at_any_moment_of_its_beginning(session_maker: SessionMaker, redis_url: str) -> None:
    """Before Python 3.12, redis-py may swallow the cancellation when it is told to end a send that takes too long."""
    for steps in range(50):
        async with Redis.from_url(redis_url, socket_timeout=5) as redis, asyncio.timeout(5):
            async with Coordinator(session_maker, redis=redis):
                for _ in range(steps):
                    await asyncio.sleep(0)
                await asyncio.sleep(0.001 * (steps % 3))


@pytest.mark.usefixtures("users")
async def test_a_lifespan_opens_and_closes_it(session_maker: SessionMaker, redis_url: str, redis: Redis) -> None:
    coordinator = Coordinator(session_maker, redis=redis_url)
    app = FastAPI(lifespan=coordinator.lifespan)

    @app.get("/wait")
    async def wait() -> str:
        async with session_maker() as session:
            return (await wait_for_row_change(session, User, 1, interval=NEVER, timeout=5)).name

    before = len(await redis.client_list())
    async with served(app) as client, session_maker() as writer:
        answer = asyncio.create_task(client.get("/wait"))
        await registered()
        await writer.execute(update(User).values(name="after"))
        await writer.commit()
        assert (await answer).json() == "after"
        assert len(await redis.client_list()) - before <= 2
    await eventually(lambda: _equal(lambda: _count(redis), before))


async def _count(redis: Redis) -> int:
    return len(await redis.client_list())


@pytest.mark.parametrize(
    "arguments", [{"max_waiters": 0}, {"max_waiters": True}, {"namespace": ""}, {"namespace": "a\0b"}, {"redis": 5}]
)
def test_bad_arguments_are_refused(session_maker: SessionMaker, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Coordinator(session_maker, **arguments)


def test_asynchronous_read_settings_are_refused_before_any_wait(session_maker: SessionMaker) -> None:
    async def settings(_session: AsyncSession) -> dict[str, str]:
        return {}

    with pytest.raises(TypeError, match="read_settings"):
        Coordinator(session_maker, read_settings=settings)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("users")
async def test_ten_seconds_without_redis_cost_an_interval_a_wait_and_no_restart(
    session_maker: SessionMaker, observer: Connection, server_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, during and after; a wait that began before the outage and one that begins in it."""
    caplog.set_level(logging.WARNING, "coord")
    with Valkey(server_directory / "outage") as valkey:
        async with Coordinator(session_maker, redis=valkey.url) as coordinator, AsyncExitStack() as stack:
            bell = coordinator._bell
            assert bell is not None
            await eventually(lambda: bell.connected)
            sessions = [await stack.enter_async_context(session_maker()) for _ in range(40)]
            tasks = [waiting(session, User, n, interval=0.3, timeout=30) for n, session in enumerate(sessions[:20], 1)]
            await registered()
            valkey.stop("immediate")
            await eventually(lambda: not bell.connected)
            tasks += [
                waiting(session, User, n, interval=0.3, timeout=30) for n, session in enumerate(sessions[20:], 21)
            ]
            end = time.monotonic() + 10
            for n, task in enumerate(tasks, 1):
                began = time.monotonic()
                async with session_maker() as writer:
                    await writer.execute(update(User).values(name="after").where(User.id == n))
                    await writer.commit()
                assert time.monotonic() - began < 0.3, "a commit waited for Redis"
                assert (await task).name == "after"
                assert time.monotonic() - began < 0.3 + 0.7
                await asyncio.sleep(max(0, (end - time.monotonic()) / (len(tasks) - n + 1)))
            valkey.start()
            await eventually(lambda: bell.connected, within=5)
            late = waiting(sessions[0], User, 100, interval=NEVER)
            await registered()
            async with session_maker() as writer:
                await writer.execute(update(User).values(name="woken").where(User.id == 100))
                await writer.commit()
            async with asyncio.timeout(1):
                assert (await late).name == "woken"
    said = [record.message for record in caplog.records if record.name == "coord.bell"]
    assert len([line for line in said if line.startswith("Redis is away")]) == 1, said
    assert said[-1] == "Redis is back, all goes on"


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(("steps", "rings"), [(-1, True), (-1, False), (0, True), (0, False), (3, True), (3, False)])
async def test_a_read_for_nobody_is_over_when_the_coordinator_is(
    single: AsyncEngine, redis_url: str, observer: Connection, steps: int, rings: bool
) -> None:
    """Or it would come back to a pool that has been disposed of, and hold a connection that nobody closes.

    A server that stops has only just cancelled the wait, perhaps within another: it leaves so many steps later, which
    without a bell is after the Coordinator's end.
    """

    async def within(waiting: asyncio.Task[Any], depth: int) -> None:
        await (waiting if depth == 0 else asyncio.create_task(within(waiting, depth - 1)))

    session_maker = async_sessionmaker(single)
    locked = observer.transaction()
    async with session_maker() as session:
        async with Coordinator(session_maker, redis=redis_url if rings else None):
            await locked.start()
            await observer.execute("LOCK TABLE users")
            task = waiting(session, User, 1)
            await eventually(lambda: observer.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            outer = asyncio.create_task(within(task, max(0, steps)))
            await asyncio.sleep(0.01)  # until each awaits the next
            outer.cancel()
            if steps < 0:
                await asyncio.wait([task])
            assert single.pool.checkedout() == 1  # type: ignore[attr-defined]
            began = time.monotonic()
        if not rings and steps >= 0:
            await asyncio.wait([outer])
            await all_given_back(single)
        assert single.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert time.monotonic() - began < 2, "it is stopped"
        await asyncio.wait([outer])
    await locked.rollback()


@pytest.mark.slow
async def test_waits_survive_a_restart_of_postgresql(server_directory: Path, redis_url: str) -> None:
    with PostgreSQL(lay(server_directory / "restarted")) as server:
        engine = create_async_engine(server.url)
        session_maker = async_sessionmaker(engine, expire_on_commit=False)
        async with engine.begin() as connection:
            await connection.run_sync(User.metadata.tables["users"].create)
            await connection.execute(text("INSERT INTO users VALUES (1, 'before'), (2, 'before')"))
        async with Coordinator(session_maker, redis=redis_url), session_maker() as one, session_maker() as two:
            task = waiting(one, User, 1, interval=0.2, timeout=30)
            await registered()
            await asyncio.to_thread(server.stop, "immediate")
            began = time.monotonic()
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(two, User, 2, interval=0.2, timeout=0.5)
            assert time.monotonic() - began < 1.5
            await asyncio.to_thread(server.start)
            await engine.dispose()
            async with session_maker() as writer:
                await writer.execute(update(User).values(name="after"))
                await writer.commit()
            assert (await task).name == "after"
        await engine.dispose()


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_read_that_is_about_to_end_as_its_coordinator_closes_is_not_cancelled(
    database_url: str, cancelled: bool
) -> None:
    """SQLAlchemy logs an error with a traceback for that. None is left behind if who closes it is cancelled."""
    closing = HeldClosing()
    async with engine_at(database_url, poolclass=NullPool) as engine:  # where a read ends with its connection
        coordinator = await Coordinator(maker := async_sessionmaker(engine), read_settings={}).__aenter__()
        async with maker() as session:
            wait = waiting(session, User, 1)
            await registered()
            event.listen(engine.sync_engine, "close", lambda connection, _: connection.run_async(closing))
            await closing.begun.wait()
            wait.cancel()
            await asyncio.wait([wait])
        leaving = asyncio.create_task(coordinator.__aexit__(None, None, None))
        await iterations()
        assert not leaving.done()
        if cancelled:
            leaving.cancel()
            await iterations()
            assert closing.cancelled
        closing.go.set()
        await asyncio.wait([leaving])
        assert leaving.cancelled() == closing.cancelled == cancelled


@pytest.mark.slow
@pytest.mark.usefixtures("users")
async def test_thousands_of_waits_cancelled_at_random_leave_nothing(
    coordinator: Coordinator, engine: AsyncEngine, session_maker: SessionMaker, redis: Redis
) -> None:
    chance = random.Random(7)

    async def wait(n: int) -> None:
        async with session_maker() as session:
            with anyio.move_on_after(chance.uniform(0, 2)) if n % 2 else anyio.CancelScope():
                await wait_for_row_change(session, User, n % 500 + 1, interval=0.5)

    tasks = [asyncio.create_task(wait(n)) for n in range(4_000)]
    for task in tasks[::2]:
        asyncio.get_running_loop().call_later(chance.uniform(0, 2), task.cancel)
    await asyncio.wait(tasks)
    assert not [task for task in tasks if not task.cancelled() and task.exception()]
    watcher = coord.waiting.watcher._watchers[asyncio.get_running_loop()][engine.dialect]
    assert watcher.waiters == 0
    assert not any(poller.waiters for poller in watcher._pollers.values())
    await eventually(lambda: _equal(redis.pubsub_channels, []))
    await all_given_back(engine)


@pytest.mark.usefixtures("users", "coordinator")
async def test_a_waiter_takes_eight_kib_with_its_session_row_and_task(session_maker: SessionMaker) -> None:
    """What its process grows by is a little more, and measured by benchmarks/waiting."""

    async def wait(n: int) -> None:
        async with session_maker() as session:
            user = await session.get(User, n)
            await session.commit()
            assert user is not None
            await wait_for_row_change(session, User, user.id, columns=[User.name], interval=NEVER)

    async def take(numbers: range, *, bytes_each: float) -> None:
        before = tracemalloc.get_traced_memory()[0]
        tasks = [asyncio.create_task(wait(n)) for n in numbers]
        await registered(len(tasks), within=30)  # tracing makes each of them slow

        def is_taken() -> bool:
            gc.collect()
            return tracemalloc.get_traced_memory()[0] - before < len(numbers) * bytes_each

        await eventually(is_taken)  # once their second reads have let go of what they had found
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    tracemalloc.start()
    try:
        await take(range(1, 101), bytes_each=float("inf"))  # what is made once counts for nobody
        await take(range(101, 301), bytes_each=8 * 1024)
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("users", "coordinator")
async def test_two_classes_on_one_table_both_hear_it(session_maker: SessionMaker) -> None:
    """One's wait may end without the other's going deaf."""
    async with session_maker() as one, session_maker() as two, session_maker() as writer:
        tasks = [waiting(one, User, 1, interval=NEVER), waiting(two, Person, 1, interval=NEVER)]
        await registered()
        tasks[1].cancel()
        await asyncio.wait(tasks[1:])
        await writer.execute(update(User).values(name="after"))
        await writer.commit()
        async with asyncio.timeout(1):
            assert (await tasks[0]).name == "after"


class Person(Base):
    """Another class on the table of `User`."""

    __table__ = User.__table__


@pytest.mark.usefixtures("users")
async def test_entering_it_twice_is_refused_and_harms_nothing(
    coordinator: Coordinator, session_maker: SessionMaker
) -> None:
    with pytest.raises(RuntimeError, match="is open already"):
        await coordinator.__aenter__()
    async with session_maker() as session, session_maker() as writer:
        task = waiting(session, User, 1, interval=NEVER)
        await registered()
        await writer.execute(update(User).values(name="after"))
        await writer.commit()
        async with asyncio.timeout(1):
            assert (await task).name == "after"


@pytest.mark.usefixtures("coordinator")
async def test_what_a_closed_session_had_changed_is_never_rung(session_maker: SessionMaker, redis: Redis) -> None:
    async with subscribed(redis) as published, session_maker() as session:
        session.add(User(id=1))
        await session.flush()
        await session.close()
        session.add(User(id=2))
        await session.commit()
        await redis.publish("coord::marker", b"")
        assert ".users:1" not in await published.has(2)


async def test_nothing_that_can_be_rung_fails_a_commit(
    coordinator: Coordinator, session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker() as session:
        session.add(User(id=1))
        await session.flush()
        coordinator.ring(session, User, "\ud800")
        coordinator.ring(session, Account, ("a/b", "\\"))
        await session.commit()
    assert await observer.fetchval("SELECT count(*) FROM users") == 1
    channels, mapper = Channels("n", "d"), mapper_of(Account)
    assert channels.row(mapper, (), ("a/b", "c")) != channels.row(mapper, (), ("a", "b/c"))


async def test_a_change_while_the_session_reads_is_no_disagreement_with_the_shared_read(
    session_maker: SessionMaker, engine: AsyncEngine, redis_url: str, observer: Connection, user: int
) -> None:
    """The session's own read began before it, and the shared read after it."""
    reads = 0
    seen: list[Any] = []

    async def change(_driver: Any) -> None:
        await observer.execute("UPDATE users SET name = name")
        seen.extend(waiters())
        await eventually(lambda: seen[0].due)  # as the shared read has told it

    def on_answer(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal reads
        if "users.name" in statement and "xmin" in statement:
            reads += 1
            if reads == 2:
                connection.connection.dbapi_connection.run_async(change)

    event.listen(engine.sync_engine, "after_cursor_execute", on_answer)
    try:
        async with Coordinator(session_maker, redis=redis_url) as coordinator, session_maker() as session:
            await eventually(lambda: coordinator._bell and coordinator._bell.connected)
            task = waiting(session, User, user)
            await registered()
            async with session_maker() as writer:
                coordinator.ring(writer, User, user)
            await eventually(lambda: reads >= 3 or (seen and seen[0].solo))
            assert not seen[0].solo, "it reads by itself from now on"
            await observer.execute("UPDATE users SET name = 'after'")
            assert (await task).name == "after"
    finally:
        event.remove(engine.sync_engine, "after_cursor_execute", on_answer)
