"""Sessions however they are bound: scoped ones, by class, routed by their own `get_bind`, on one connection."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Delete, Update, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, make_transient_to_detached

import coord
import coord.http
from coord import (
    Coordinator,
    Job,
    UncommittedChangesError,
    advisory_lock,
    cancel_job,
    cancel_jobs,
    create_db_context,
    create_db_dependency,
    enqueue,
    get_job,
    get_transaction,
    job_transaction,
    list_jobs,
    lock_tables,
    retry_job,
    retry_jobs,
    set_result,
    wait_for_row_change,
    watch_row,
)
from coord.database.engine import bind_for_writes
from coord.http import Reply, reply
from coord.notify.channels import Channels
from tests.ledger import a_task, delivered
from tests.models import Base, Item, User
from tests.serving import engine_at, served
from tests.shop import empty_database
from tests.waits import registered, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger", "nobody_left_waiting")

NEVER = 60.0


@pytest.fixture
async def elsewhere(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine whose database has no table at all, so that whatever is sent there fails."""
    async with empty_database(database_url) as url:
        async with engine_at(url) as engine:
            yield engine


def routed(leader: AsyncEngine, follower: AsyncEngine) -> SessionMaker:
    """As SQLAlchemy's documentation routes: what writes to the leader, all else to the follower."""

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Any:
            writes = self._flushing or isinstance(clause, Update | Delete)
            return (leader if writes else follower).sync_engine

    return async_sessionmaker(sync_session_class=Routing, expire_on_commit=False)


@pytest.fixture(params=["bind", "binds", "routed"])
def maker(request: pytest.FixtureRequest, engine: AsyncEngine, elsewhere: AsyncEngine) -> SessionMaker:
    if request.param == "routed":
        return routed(engine, elsewhere)
    given: dict[str, Any] = {"bind": engine}
    if request.param == "binds":
        given = {"binds": {Base: engine, Job: engine}}
    return async_sessionmaker(**given, expire_on_commit=False)


async def test_every_operation_goes_where_its_rows_are_written(
    maker: SessionMaker, observer: Connection, redis_url: str
) -> None:
    async with Coordinator(maker, redis=redis_url) as coordinator, maker() as session:
        async with get_transaction(session):
            session.add(User(id=1, name="new"))
        async with lock_tables(session, [User, Item, Job]):
            assert await observer.fetchval(
                "SELECT count(*) FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND relation::regclass::text IN "
                "('users', 'items', 'coord_jobs')"
            ) == 3  # fmt: skip
            job = await enqueue(session, a_task)
        with pytest.raises(UncommittedChangesError):
            async with session.begin():
                await enqueue(session, a_task)
                await wait_for_row_change(session, User, 1, timeout=1)
        assert (await list_jobs(session))[0].id == job.id
        await session.rollback()
        task = waiting(session, User, 1, interval=NEVER, job=job)
        await registered(2)
        async with maker() as other:
            user = User(id=1, name="new")
            make_transient_to_detached(user)
            other.add(user)
            user.name = "changed"
            await other.commit()
            coordinator.ring(other, User, 1)
        async with asyncio.timeout(5):
            assert (await task).name == "changed"
        assert await cancel_job(session, job.id) == "cancelled"
        await retry_job(session, job.id)
        assert await cancel_jobs(session) == 1
        assert await retry_jobs(session) == 1
        await session.commit()
        async with job_transaction(delivered(await copied(session, job), maker)) as own:
            own.add(User(id=2, name="by the job"))
        assert (await get_job(session, job.id)).state == "done"
        await session.rollback()


async def copied(session: AsyncSession, job: Job) -> Job:
    report = await get_job(session, job.id)
    await session.rollback()
    return Job(
        id=job.id, task=job.task, attempt=report.attempt, arguments=job.arguments, queue=job.queue, priority=0, deaths=0
    )


async def test_a_named_lock_is_where_writes_go_and_refused_where_nothing_says_which_engine_that_is(
    engine: AsyncEngine, elsewhere: AsyncEngine, observer: Connection
) -> None:
    async with routed(engine, elsewhere)() as session, advisory_lock(session, 7):
        assert not await observer.fetchval("SELECT pg_try_advisory_lock(7)")
    async with async_sessionmaker(binds={Base: engine})() as session:
        with pytest.raises(ValueError, match="bound to one asynchronous engine here"):
            advisory_lock(session, 7)


async def test_locks_on_two_engines_are_refused(engine: AsyncEngine, elsewhere: AsyncEngine) -> None:
    async with async_sessionmaker(binds={User: engine, Item: elsewhere})() as session:
        with pytest.raises(ValueError, match="these tables on different engines"):
            lock_tables(session, [User, Item])
        async with lock_tables(session, [User]):
            pass


async def test_a_row_and_its_job_may_be_in_two_databases(
    engine: AsyncEngine, elsewhere: AsyncEngine, redis_url: str
) -> None:
    async with elsewhere.begin() as connection:
        await connection.run_sync(User.metadata.create_all, tables=[User.__table__])  # type: ignore[list-item]
    maker = async_sessionmaker(bind=engine, binds={User: elsewhere}, expire_on_commit=False)
    async with Coordinator(maker, redis=redis_url, read_settings={}), maker() as session:
        session.add(User(id=1, name="new"))
        job = await enqueue(session, a_task)
        await session.commit()
        task = waiting(session, User, 1, interval=NEVER, job=job)
        await registered(2)
        async with maker() as other:
            await other.execute(update(User).values(name="changed"))
            await other.commit()
        async with asyncio.timeout(5):
            assert (await task).name == "changed"
        task = waiting(session, User, 1, interval=NEVER, job=job)
        await registered(2)
        async with job_transaction(delivered(job, maker)):
            pass
        async with asyncio.timeout(5):
            await task


@pytest.mark.parametrize("how", ["bound later", "binds", "routed"])
async def test_a_request_commits_however_its_session_is_bound(
    engine: AsyncEngine, elsewhere: AsyncEngine, observer: Connection, how: str
) -> None:
    maker = routed(engine, elsewhere) if how == "routed" else async_sessionmaker(expire_on_commit=False)
    coordinator, get_db, context = Coordinator(maker), create_db_dependency(maker), create_db_context(maker)
    if how != "routed":
        maker.configure(**({"bind": engine} if how == "bound later" else {"binds": {Base: engine, Job: engine}}))
    app = FastAPI(lifespan=coordinator.lifespan)

    @app.post("/users/{user_id}")
    async def add(user_id: int, session: AsyncSession = Depends(get_db)) -> None:
        session.add(User(id=user_id, name=""))
        await enqueue(session, a_task)

    async with served(app) as client:
        assert (await client.post("/users/1")).status_code == 200
        assert await observer.fetchval("SELECT count(*) FROM users, coord_jobs") == 1
    async with context() as session:
        await enqueue(session, a_task)
    assert await observer.fetchval("SELECT count(*) FROM coord_jobs") == 2


async def test_a_connection_by_class_is_refused(engine: AsyncEngine) -> None:
    async with engine.connect() as connection, async_sessionmaker(binds={User: connection})() as session:
        with pytest.raises(ValueError, match="by bind=, and not by binds="):
            await wait_for_row_change(session, User, 1)


# async_scoped_session


@asynccontextmanager
async def scoped(engine: AsyncEngine) -> AsyncIterator[async_scoped_session[AsyncSession]]:
    scope = async_scoped_session(async_sessionmaker(engine, expire_on_commit=False), asyncio.current_task)
    yield scope
    await scope.remove()


async def test_a_scoped_session_is_taken_wherever_a_session_is(engine: AsyncEngine, redis_url: str) -> None:
    maker = async_sessionmaker(engine, expire_on_commit=False)
    async with Coordinator(maker, redis=redis_url) as coordinator, scoped(engine) as scope:
        async with get_transaction(scope) as session:
            assert session is scope()
            scope.add(User(id=1, name="new"))
            async with get_transaction(scope), lock_tables(scope, [User]), advisory_lock(scope, 7):
                job = await enqueue(scope, a_task)
        assert [report.id for report in await list_jobs(scope)] == [job.id]
        assert await cancel_job(scope, job.id) == "cancelled"
        job = await retry_job(scope, job.id)
        await scope.commit()
        async with maker() as other:
            await other.execute(text("UPDATE users SET name = 'changed'"))
            coordinator.ring(other, User, 1)
            await other.commit()
        coordinator.ring(scope, User, 1)
        assert (await wait_for_row_change(scope, User, 1, job=job, since={"name": "new"})).name == "changed"
        async with watch_row(scope, User, 1) as states:
            assert (await anext(states)).name == "changed"
        async with job_transaction(delivered(job, maker)) as own:
            await set_result(async_scoped_session(lambda: own, asyncio.current_task), 5)  # type: ignore[arg-type]
        assert (await get_job(scope, job.id)).result == 5


async def test_a_reply_waits_with_its_handlers_scoped_session(engine: AsyncEngine, observer: Connection) -> None:
    """The wait is in a task of its own: its scope's session would have seen nothing, and nobody would close it."""
    await observer.execute("INSERT INTO users VALUES (1, 'before')")
    app = FastAPI()

    @app.get("/")
    async def read(answer: Reply = Depends(reply)) -> list[Any]:
        async with scoped(engine) as scope:
            user = await scope.get_one(User, 1)
            await scope.commit()
            await observer.execute("UPDATE users SET name = 'after'")
            return [await answer.row(scope, User, 1) is user, user.name, len(scope.registry.registry)]

    async with served(app) as client:
        assert (await client.get("/", headers={"Prefer": "wait=1"})).json() == [True, "after", 1]


def test_every_public_function_with_a_session_takes_a_scoped_one() -> None:
    modules = [getattr(module, name) for module in (coord, coord.http) for name in module.__all__]
    methods = [each for value in modules if inspect.isclass(value) for each in vars(value).values()]
    functions = [each for each in [*modules, *methods] if inspect.isfunction(each) and each.__name__[0] != "_"]
    found = {
        function.__qualname__: str(inspect.signature(function).parameters["session"].annotation)
        for function in functions
        if "session" in inspect.signature(function).parameters
    }
    assert len(found) > 15
    assert {name: given for name, given in found.items() if given != "AnySession"} == {}


async def test_a_change_is_published_under_the_map_that_it_was_written_under(
    engine: AsyncEngine, elsewhere: AsyncEngine
) -> None:
    """Which the engine has that is written to, and not the one that is read."""
    channels, mapper = Channels("coord", "shop"), User.__mapper__
    async with routed(engine, elsewhere)() as session:
        options = {"schema_translate_map": {None: "acme"}}
        await session.connection(bind_arguments=dict(bind_for_writes(mapper)), execution_options=options)
        published = channels.of_changes(session.sync_session, [(mapper, (1,))])
    assert published == [channels.row(mapper, ((None, "acme"),), (1,))]
