"""Two tenants whose orders have the same numbers: each is given its own rows, whoever else waits, reads and writes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from coord import Coordinator, Job, JobFailedError, RowNotFoundError, WaitTimeoutError, enqueue, wait_for_row_change
from coord.http import EventStreams
from coord.waiting import woken
from tests.serving import all_given_back, eventually
from tests.waits import registered, waiters, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.usefixtures("nobody_left_waiting")

TENANTS = ("acme", "bolt")
PAGE = Path(__file__).parent.parent / "docs" / "tenants.md"
tenant: ContextVar[str] = ContextVar("tenant")


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "tenant_orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    status: Mapped[str]


@pytest.fixture
async def orders(observer: Connection) -> AsyncIterator[None]:
    """One in each tenant's schema, with the same number, and both in one table that is secured by rows."""
    await observer.execute("DROP ROLE IF EXISTS tenant_role; CREATE ROLE tenant_role")
    for name in TENANTS:
        await observer.execute(f"""
            CREATE SCHEMA {name}; GRANT USAGE ON SCHEMA {name} TO tenant_role;
            CREATE TABLE {name}.tenant_orders (id int PRIMARY KEY, owner text, status text);
            INSERT INTO {name}.tenant_orders VALUES (1, '{name}', 'pending')
        """)
    await observer.execute("""
        CREATE TABLE tenant_orders (id int, owner text, status text, PRIMARY KEY (id, owner));
        INSERT INTO tenant_orders VALUES (1, 'acme', 'pending'), (1, 'bolt', 'pending');
        ALTER TABLE tenant_orders ENABLE ROW LEVEL SECURITY;
        CREATE POLICY own ON tenant_orders USING (owner = current_setting('app.tenant', true));
        GRANT ALL ON tenant_orders TO tenant_role
    """)
    yield
    await observer.execute("""
        DROP SCHEMA acme CASCADE; DROP SCHEMA bolt CASCADE; DROP TABLE tenant_orders; DROP ROLE tenant_role
    """)


@asynccontextmanager
async def connected(database_url: str, size: int = 2, **settings: str) -> AsyncIterator[AsyncEngine]:
    """With few connections, so that each has often been another tenant's."""
    arguments = {"server_settings": settings}
    engine = create_async_engine(database_url, pool_size=size, max_overflow=0, connect_args=arguments)
    yield engine
    await all_given_back(engine)
    await engine.dispose()


async def change(observer: Connection, name: str, status: str, *, secured: bool) -> None:
    if secured:
        await observer.execute("UPDATE tenant_orders SET status = $1 WHERE owner = $2", status, name)
    else:
        await observer.execute(f"UPDATE {name}.tenant_orders SET status = $1", status)


async def play(
    sessions: Mapping[str, Callable[..., AsyncSession]],
    observer: Connection,
    *,
    secured: bool = False,
    loaded: bool = True,
) -> None:
    """Both wait; the change of one is news to that one alone."""

    async def wait(name: str) -> tuple[str, str]:
        tenant.set(name)
        async with sessions[name]() as session:
            own = await session.get_one(Order, 1) if loaded else None
            found = await wait_for_row_change(session, Order, 1, interval=0.05, timeout=10)
            assert own is None or found is own
            return found.owner, found.status

    tasks = {name: asyncio.create_task(wait(name)) for name in TENANTS}
    await registered(2)
    for name in TENANTS:
        await change(observer, name, "done", secured=secured)
        assert await tasks[name] == (name, "done")
        others = [task for other, task in tasks.items() if other > name]
        if others:
            assert not (await asyncio.wait(others, timeout=0.3))[0]


def page(engine: AsyncEngine) -> dict[str, Any]:
    """What the page's examples make."""
    found: dict[str, Any] = {"engine": engine}
    for block in PAGE.read_text().split("```python\n")[1:]:
        exec(block.split("```")[0], found)  # noqa: S102 - as a reader would run it
    return found


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("way", ["map", "path", "security"])
async def test_each_way_of_the_page_gives_each_tenant_its_own(
    database_url: str, observer: Connection, way: str, declared: bool
) -> None:
    opened = connected(database_url, role="tenant_role") if way == "security" else connected(database_url)
    async with opened as engine:
        made = page(engine)
        if way == "map":
            sessions = {name: made["sessions_of"](name) for name in TENANTS}
            coordinator = made["by_map"]
        else:
            maker = made["path_sessions" if way == "path" else "secure_sessions"]
            sessions = {name: lambda name=name: maker(info={"tenant": name}) for name in TENANTS}
            coordinator = made["by_path" if way == "path" else "secured"]
        async with coordinator if declared else nullcontext():
            await play(sessions, observer, secured=way == "security")


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("declared", [True, False])
async def test_the_map_of_the_callers_own_transaction_counts(
    database_url: str, observer: Connection, declared: bool
) -> None:
    async with connected(database_url) as engine, AsyncExitStack() as stack:
        maker = async_sessionmaker(engine, expire_on_commit=False)
        if declared:
            await stack.enter_async_context(Coordinator(maker, read_settings={}))
        session = await stack.enter_async_context(maker())
        await session.connection(execution_options={"schema_translate_map": {None: "bolt"}})
        own = await session.get_one(Order, 1)
        task = waiting(session, Order, 1)
        await registered()
        await change(observer, "bolt", "done", secured=False)
        assert await task is own
        assert (own.owner, own.status) == ("bolt", "done")


@pytest.mark.usefixtures("orders", "ledger")
@pytest.mark.parametrize("outcome", ["done", "failed"])
@pytest.mark.parametrize("declared", [True, False])
async def test_the_map_of_the_callers_transaction_is_the_orders_and_not_the_jobs(
    database_url: str, observer: Connection, declared: bool, outcome: str
) -> None:
    """The wait for a job ends with it, and reads the tenant's row: the ledger has one place."""
    async with connected(database_url) as engine, AsyncExitStack() as stack:
        maker = async_sessionmaker(engine, expire_on_commit=False)
        await stack.enter_async_context(Coordinator(maker, read_settings={} if declared else None))
        session = await stack.enter_async_context(maker())
        await session.connection(execution_options={"schema_translate_map": {None: "bolt"}})
        own = await session.get_one(Order, 1)
        job = await enqueue(session, "fulfil", 1)
        await session.commit()
        task = waiting(session, Order, 1, job=job)
        await registered()
        await change(observer, "acme", "acme's own", secured=False)
        if outcome == "done":
            await change(observer, "bolt", outcome, secured=False)
        await observer.execute("UPDATE coord_jobs SET state = $1, error = 'no stock' WHERE id = $2", outcome, job.id)
        if outcome == "failed":
            with pytest.raises(JobFailedError, match="no stock"):
                await task
        else:
            assert await task is own
            assert (own.owner, own.status) == ("bolt", "done")


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("declared", [True, False])
async def test_the_map_of_one_tenants_engine_is_no_other_tenants(
    database_url: str,
    observer: Connection,
    declared: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines of one pool share their reads, by the engine that came first."""
    monkeypatch.setattr(woken, "_warned", set())
    async with connected(database_url) as engine, AsyncExitStack() as stack:
        sessions_of = page(engine)["sessions_of"]
        sessions = {name: sessions_of(name) for name in TENANTS}
        for maker in sessions.values():
            await stack.enter_async_context(Coordinator(maker, read_settings={} if declared else None))
        await play(sessions, observer)
    assert not [record.message for record in caplog.records if record.name == "coord.waiting"]


@pytest.mark.usefixtures("orders", "ledger")
async def test_the_jobs_of_all_tenants_are_read_at_once(database_url: str) -> None:
    async with connected(database_url) as engine, AsyncExitStack() as stack:
        sessions_of = page(engine)["sessions_of"]
        tasks = []
        for name in TENANTS:
            session = await stack.enter_async_context(sessions_of(name)())
            job = await enqueue(session, "fulfil", 1)
            await session.commit()
            tasks += [waiting(session, Order, 1, job=job), waiting(sessions_of(name)(), Job, job.id)]
        await registered(6)
        of_jobs = [waiter._poller for waiter in waiters() if waiter.target.mapper.class_ is Job]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len(of_jobs) == 4
        assert len({id(poller) for poller in of_jobs}) == 2  # woken, and those that are handed the rows


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("way", ["map", "path"])
async def test_an_event_stream_is_of_the_tenant_whose_session_has_read_the_row(
    database_url: str, observer: Connection, way: str, declared: bool
) -> None:
    """By the map of that session's transaction, or by what its `info` says to a hook."""
    async with connected(database_url) as engine, AsyncExitStack() as stack:
        made = page(engine)
        maker = made["path_sessions"] if way == "path" else async_sessionmaker(engine, expire_on_commit=False)
        if declared:
            await stack.enter_async_context(made["by_path" if way == "path" else "by_map"])
        session = await stack.enter_async_context(maker(info={"tenant": "bolt"}))
        if way == "map":
            await session.connection(execution_options={"schema_translate_map": {None: "bolt"}})
        own = await session.get_one(Order, 1)
        await session.commit()
        following = EventStreams(maker).of(lambda: own, id=lambda order: f"{order.owner} {order.status}")
        states = await stack.enter_async_context(asynccontextmanager(following)(own, None))
        assert (await anext(states)).owner == "bolt"
        changed = asyncio.ensure_future(anext(states))
        await registered()
        await change(observer, "bolt", "done", secured=False)
        found = await changed
        assert (found.owner, found.status) == ("bolt", "done")


def set_path(connection: Any, path: str) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET search_path = {path}")
    cursor.close()


def always(connection: Any, *_: Any) -> None:
    set_path(connection, tenant.get("public"))


def for_a_tenant(connection: Any, *_: Any) -> None:
    """A connection keeps what its last borrower had."""
    if (name := tenant.get(None)) is not None:
        set_path(connection, name)


def or_raise(connection: Any, *_: Any) -> None:
    set_path(connection, tenant.get())


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("hook", [always, for_a_tenant, or_raise])
@pytest.mark.parametrize("size", [1, 2])
async def test_a_hook_that_reads_the_context_gives_each_tenant_its_own(
    database_url: str,
    observer: Connection,
    hook: Callable[..., None],
    size: int,
    loaded: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Undeclared, since nobody has said so; a pool of one has the shared read go where the last tenant was."""
    monkeypatch.setattr(woken, "_warned", set())
    caplog.set_level(logging.WARNING, "coord.waiting")
    async with connected(database_url, size) as engine:
        event.listen(engine.sync_engine, "checkout", hook)
        maker = async_sessionmaker(engine, expire_on_commit=False)
        await play(dict.fromkeys(TENANTS, maker), observer, loaded=loaded)
    said = [record.message for record in caplog.records]
    if hook is or_raise:
        assert len(said) == 1
        assert "read_settings" in said[0]


@pytest.mark.usefixtures("orders")
async def test_a_setting_that_was_lost_with_the_commit_is_named(database_url: str) -> None:
    async with connected(database_url, role="tenant_role") as engine, AsyncSession(engine) as session:
        await session.execute(text("SELECT set_config('app.tenant', 'acme', true)"))
        own = await session.get_one(Order, 1)
        session.expunge(own)
        with pytest.raises(RowNotFoundError, match="read_settings"):
            await wait_for_row_change(session, Order, 1, since={"status": own.status}, timeout=1)


@pytest.mark.usefixtures("orders")
async def test_waits_with_equal_settings_share_their_reads(database_url: str) -> None:
    async with connected(database_url) as engine, AsyncExitStack() as stack:
        maker = async_sessionmaker(engine, expire_on_commit=False)
        declared = Coordinator(maker, read_settings=lambda session: {"search_path": session.info["tenant"]})
        await stack.enter_async_context(declared)
        tasks = []
        for name in ("acme", "acme", "bolt"):
            session = await stack.enter_async_context(maker(info={"tenant": name}))
            tasks.append(waiting(session, Order, 1, interval=60))
        await registered(3)
        assert len({id(waiter._poller) for waiter in waiters()}) == 2
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.mark.usefixtures("orders")
async def test_settings_hold_although_the_engine_that_came_first_has_no_transactions(
    database_url: str, observer: Connection
) -> None:
    async with connected(database_url, role="tenant_role") as engine:
        maker = page(engine)["secure_sessions"]
        sessions = {name: lambda name=name: maker(info={"tenant": name}) for name in TENANTS}
        alone = async_sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"))
        async with Coordinator(alone, read_settings=lambda session: {"app.tenant": session.info["tenant"]}):
            await play(sessions, observer, secured=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a b": "x"}, "not the name of a setting"),
        ({5: "x"}, "not the name of a setting"),
        ({"app.tenant": 5}, "is text"),
        ({"app.tenant": "a\0"}, "is text"),
        ([("app.tenant", "x")], "is a mapping"),
        ("app.tenant", "is a mapping"),
    ],
)
async def test_settings_that_are_none_are_refused(
    session_maker: async_sessionmaker[AsyncSession], settings: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Coordinator(session_maker, read_settings=settings)
    async with Coordinator(session_maker, read_settings=lambda _: settings), session_maker() as session:
        with pytest.raises(ValueError, match=message):
            await wait_for_row_change(session, Order, 1, timeout=1)


@pytest.mark.usefixtures("orders")
async def test_a_hook_of_the_sessions_sees_the_wait_read(database_url: str) -> None:
    """One that hides what was deleted softly, say."""
    seen: list[str] = []

    class Listened(Session):
        pass

    event.listen(Listened, "do_orm_execute", lambda state: seen.append(str(state.statement)))
    async with connected(database_url, search_path="acme") as engine:
        maker = async_sessionmaker(engine, sync_session_class=Listened)
        async with maker() as session:
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, Order, 1, timeout=0.1)
    await eventually(lambda: seen)
