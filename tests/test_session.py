"""Sessions: committed before the answer, rolled back on every error, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from coord import (
    Coordinator,
    advisory_lock,
    create_db_context,
    create_db_dependency,
    get_transaction,
    lock_tables,
    worker_settings,
)
from tests import warm
from tests.models import Item, User
from tests.serving import eventually, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from asyncpg import Connection

pytestmark = pytest.mark.usefixtures("tables")

CLIENTS = 60
"""Who leave at once."""
BUSY = """SELECT state, query FROM pg_stat_activity
          WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'"""


def shop(session_maker: async_sessionmaker[AsyncSession]) -> FastAPI:
    """Handlers that commit, fail to, stream and go on afterwards."""
    app = FastAPI()
    app.state.seen = []
    get_db = create_db_dependency(session_maker=session_maker)
    register_writes(app, plain=Depends(get_db), function=Depends(get_db, scope="function"))
    register_failures(app, plain=Depends(get_db), function=Depends(get_db, scope="function"))
    return app


def register_writes(app: FastAPI, plain: Any, function: Any) -> None:
    def subordinate(session: AsyncSession = function) -> AsyncSession:
        return session

    async def afterwards(engine: AsyncEngine, user_id: int) -> None:
        async with engine.connect() as connection:
            app.state.seen.append(await connection.scalar(select(User.id).where(User.id == user_id)))

    @app.post("/plain/{user_id}")
    async def post_plain(user_id: int, tasks: BackgroundTasks, session: AsyncSession = plain) -> None:
        session.add(User(id=user_id))
        assert isinstance(session.bind, AsyncEngine)
        tasks.add_task(afterwards, session.bind, user_id)

    @app.post("/function/{user_id}")
    async def post_function(user_id: int, session: AsyncSession = function) -> None:
        session.add(User(id=user_id))

    @app.post("/mixed/{user_id}")
    async def mixed(
        user_id: int, a: AsyncSession = plain, b: AsyncSession = function, c: AsyncSession = Depends(subordinate)
    ) -> dict[str, bool]:
        a.add(User(id=user_id))
        return {"one": a is b is c}

    @app.post("/stream/{user_id}")
    async def stream(user_id: int, session: AsyncSession = plain) -> StreamingResponse:
        session.add(User(id=user_id, name="streamed"))

        async def body() -> AsyncIterator[str]:
            yield str(await session.scalar(select(User.name).where(User.id == user_id)))
            session.add(User(id=user_id + 1, name="written by the body"))
            await session.flush()

        return StreamingResponse(body())


def register_failures(app: FastAPI, plain: Any, function: Any) -> None:
    @app.post("/plain-broken")
    async def plain_broken(session: AsyncSession = plain) -> None:
        session.add(Item(user_id=-1))

    @app.post("/function-broken")
    async def function_broken(session: AsyncSession = function) -> None:
        session.add(Item(user_id=-1))

    @app.post("/swallowed/{user_id}")
    async def swallowed(user_id: int, session: AsyncSession = plain) -> None:
        session.add(User(id=user_id))
        await session.flush()
        with contextlib.suppress(DBAPIError):
            await session.execute(
                text("SELECT 1 / 0")
            )  # the transaction is lost, and PostgreSQL will answer COMMIT with ROLLBACK and no error

    @app.post("/raises/{user_id}")
    async def raises(user_id: int, session: AsyncSession = plain) -> None:
        session.add(User(id=user_id))
        await session.flush()
        raise HTTPException(409)

    @app.post("/returns/{user_id}")
    async def returns(user_id: int, session: AsyncSession = plain) -> JSONResponse:
        session.add(User(id=user_id))
        return JSONResponse({}, status_code=409)

    @app.get("/slow")
    async def slow(session: AsyncSession = plain) -> None:
        await session.execute(text("SELECT pg_sleep(60)"))

    @app.get("/slow-stream")
    async def slow_stream(session: AsyncSession = plain) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "first "
            await session.execute(text("SELECT pg_sleep(60)"))

        return StreamingResponse(body())


async def until_the_client_leaves(request: Request, call_next: Any) -> Response:
    """What people write to stop work for nobody. The middleware's task group then cancels the handler's every await."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        response: Response = await call_next(request)
        group.cancel_scope.cancel()
    return response


@pytest.fixture
async def client(session_maker: async_sessionmaker[AsyncSession]) -> AsyncIterator[httpx.AsyncClient]:
    async with served(shop(session_maker)) as client:
        yield client


@pytest.mark.parametrize("route", ["plain", "function", "mixed", "stream"])
async def test_a_client_that_got_2xx_finds_its_row_at_once(
    client: httpx.AsyncClient, observer: Connection, route: str
) -> None:
    for user_id in range(10, 510, 10):
        async with client.stream("POST", f"/{route}/{user_id}") as response:  # the headers are here, the body is not
            assert response.status_code == 200
            assert await observer.fetchval("SELECT id FROM users WHERE id = $1", user_id) == user_id


async def test_both_scopes_in_one_request_share_one_session(client: httpx.AsyncClient) -> None:
    response = await client.post("/mixed/1")
    assert response.json() == {"one": True}


@pytest.mark.parametrize("route", ["plain-broken", "function-broken", "swallowed/5"])
async def test_a_commit_that_fails_is_an_error_status(
    client: httpx.AsyncClient, observer: Connection, route: str
) -> None:
    response = await client.post(f"/{route}")
    assert response.status_code == 500
    assert await observer.fetchval("SELECT count(*) FROM items") == 0
    assert await observer.fetchval("SELECT count(*) FROM users") == 0


async def test_raising_rolls_back_and_returning_commits(client: httpx.AsyncClient, observer: Connection) -> None:
    assert (await client.post("/raises/1")).status_code == 409
    assert (await client.post("/returns/2")).status_code == 409
    assert [row["id"] for row in await observer.fetch("SELECT id FROM users")] == [2]


async def test_background_tasks_run_after_the_commit(session_maker: async_sessionmaker[AsyncSession]) -> None:
    app = shop(session_maker)
    async with served(app) as client:
        await client.post("/plain/7")

        async def seen() -> Any:
            return app.state.seen

        assert await eventually(seen) == [7]


async def test_a_streaming_body_reads_and_cannot_write(client: httpx.AsyncClient, observer: Connection) -> None:
    response = await client.post("/stream/20")
    assert response.text == "streamed"
    assert [row["id"] for row in await observer.fetch("SELECT id FROM users")] == [20]


@pytest.mark.parametrize("how", ["BaseHTTPMiddleware", "streaming body"])
async def test_clients_that_leave_leave_nothing_behind(database_url: str, observer: Connection, how: str) -> None:
    engine = create_async_engine(database_url, pool_size=CLIENTS, max_overflow=0)
    app = shop(async_sessionmaker(engine, expire_on_commit=False))
    if how == "BaseHTTPMiddleware":
        app.add_middleware(BaseHTTPMiddleware, dispatch=until_the_client_leaves)
    path = "/slow" if how == "BaseHTTPMiddleware" else "/slow-stream"
    limits = httpx.Limits(max_connections=CLIENTS)
    async with served(app, limits=limits) as client:
        requests = [asyncio.create_task(client.get(path)) for _ in range(CLIENTS)]

        async def all_sleep() -> bool:
            asleep = await observer.fetchval(f"SELECT count(*) FROM ({BUSY}) AS busy WHERE query LIKE '%sleep%'")
            return bool(asleep == CLIENTS)

        await eventually(all_sleep, within=30)
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)

        async def nothing_left() -> bool:
            return not await observer.fetch(BUSY) and engine.pool.checkedout() == 0  # type: ignore[attr-defined]

        await eventually(nothing_left, within=20)
    await engine.dispose()


@pytest.mark.parametrize("how", ["anyio", "task"])
@pytest.mark.parametrize("nested", [False, True])
async def test_cancellation_rolls_back_and_frees_the_connection(
    session_maker: async_sessionmaker[AsyncSession], engine: AsyncEngine, observer: Connection, how: str, nested: bool
) -> None:
    context = create_db_context(session_maker=session_maker)
    written = asyncio.Event()

    async def work() -> None:
        async with context() as session:
            session.add(User(id=1))
            await session.flush()
            written.set()
            if not nested:
                await session.execute(text("SELECT pg_sleep(60)"))
            async with get_transaction(session):
                await session.execute(text("SELECT pg_sleep(60)"))

    async def scoped() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await written.wait()
            await eventually(lambda: observer.fetch(f"{BUSY} AND query LIKE '%sleep%'"))
            group.cancel_scope.cancel()

    if how == "anyio":
        await scoped()
    else:
        task = asyncio.create_task(work())
        await written.wait()
        await eventually(lambda: observer.fetch(f"{BUSY} AND query LIKE '%sleep%'"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    async def nothing_busy() -> bool:
        return not await observer.fetch(BUSY)

    await eventually(nothing_busy, within=2)
    assert await observer.fetchval("SELECT count(*) FROM users") == 0


async def test_a_statement_that_failed_inside_a_savepoint_does_not_stop_the_commit(
    session_maker: async_sessionmaker[AsyncSession], observer: Connection
) -> None:
    async with create_db_context(session_maker)() as session:
        session.add(User(id=1))
        await session.flush()
        with pytest.raises(DBAPIError):
            async with get_transaction(session):
                session.add(User(id=2))
                await session.flush()
                await session.execute(text("SELECT 1 / 0"))
        session.add(User(id=3))
    assert [row["id"] for row in await observer.fetch("SELECT id FROM users ORDER BY id")] == [1, 3]


async def test_the_dependency_commits_when_used_bare(
    session_maker: async_sessionmaker[AsyncSession], observer: Connection
) -> None:
    get_db = create_db_dependency(session_maker=session_maker)
    async with asynccontextmanager(get_db)() as session:
        session.add(User(id=1))
    async for session in get_db():
        session.add(User(id=2))
    with pytest.raises(KeyError):
        async with asynccontextmanager(get_db)() as session:
            session.add(User(id=3))
            raise KeyError
    assert [row["id"] for row in await observer.fetch("SELECT id FROM users ORDER BY id")] == [1, 2]


async def test_no_connection_is_taken_before_the_first_statement(
    session_maker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with create_db_context(session_maker)() as session:
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await session.execute(select(User))
        assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]


async def test_an_outer_transaction_commits_what_an_inner_one_kept(
    session_maker: async_sessionmaker[AsyncSession], observer: Connection
) -> None:
    async with session_maker() as session:
        async with get_transaction(session=session):
            session.add(User(id=1))
            with pytest.raises(KeyError):
                async with get_transaction(session=session):
                    session.add(User(id=2))
                    raise KeyError
            async with get_transaction(session=session):
                session.add(User(id=3))
        assert [row["id"] for row in await observer.fetch("SELECT id FROM users ORDER BY id")] == [1, 3]


async def test_a_request_without_an_exit_stack_before_its_response_is_refused(
    session_maker: async_sessionmaker[AsyncSession],
) -> None:
    get_db = create_db_dependency(session_maker)
    connection = HTTPConnection({"type": "http"})
    with pytest.raises(RuntimeError, match="cannot commit before the response"):
        await anext(get_db(connection))


def test_an_engine_where_a_session_maker_is_expected_is_a_type_error_that_says_so(engine: AsyncEngine) -> None:
    given: Any = engine
    for make in (
        create_db_dependency,
        create_db_context,
        Coordinator,
        lambda maker: worker_settings([], session_maker=maker, redis="redis://localhost"),
    ):
        with pytest.raises(TypeError, match=r"session_maker is what async_sessionmaker\(engine\) makes, not <.*Engine"):
            make(given)


def test_an_engine_that_is_not_asyncpg_is_refused() -> None:
    other = create_async_engine("sqlite+aiosqlite://")
    for create in (create_db_dependency, create_db_context):
        with pytest.raises(ValueError, match=r"needs postgresql\+asyncpg, not sqlite\+aiosqlite"):
            create(async_sessionmaker(other))


async def test_a_maker_may_be_bound_after_the_dependency_is_made(
    engine: AsyncEngine, observer: Connection, tables: None
) -> None:
    """In a lifespan, say; until then its sessions are refused with a sentence."""
    maker: async_sessionmaker[AsyncSession] = async_sessionmaker()
    get_db, context = create_db_dependency(maker), create_db_context(maker)
    with pytest.raises(ValueError, match="bound to one asynchronous engine"):
        async with context():
            pass
    maker.configure(bind=engine)
    async with context() as session:
        session.add(User(id=1))
    async with asynccontextmanager(get_db)() as session:
        session.add(User(id=2))
    assert await observer.fetchval("SELECT count(*) FROM users") == 2


async def add_in_a_transaction(session: AsyncSession) -> None:
    async with get_transaction(session):
        session.add(User(id=1))


async def add_under_a_lock(session: AsyncSession) -> None:
    async with lock_tables(session, [Item]):
        session.add(User(id=1))


async def add_under_an_advisory_lock(session: AsyncSession) -> None:
    async with advisory_lock(session, "a name"):
        session.add(User(id=1))


@pytest.mark.parametrize("block", [add_in_a_transaction, add_under_a_lock, add_under_an_advisory_lock])
@pytest.mark.parametrize("first", ["nothing", "a read", "a pending row"])
@pytest.mark.parametrize("where", ["request", "context"])
async def test_nothing_of_what_fails_stays_whatever_came_first(
    session_maker: async_sessionmaker[AsyncSession],
    observer: Connection,
    block: Callable[[AsyncSession], Awaitable[None]],
    first: str,
    where: str,
) -> None:
    async def work(session: AsyncSession) -> None:
        if first == "a read":
            await session.get(User, 100)
        if first == "a pending row":
            session.add(Item(id=100))
        await block(session)
        raise HTTPException(409)

    if where == "context":
        with pytest.raises(HTTPException):
            async with create_db_context(session_maker)() as session:
                await work(session)
    else:
        app = FastAPI()

        @app.post("/")
        async def route(session: AsyncSession = Depends(create_db_dependency(session_maker))) -> None:  # noqa: B008
            await work(session)

        async with served(app) as client:
            assert (await client.post("/")).status_code == 409
    assert await observer.fetchval("SELECT count(*) FROM users") == 0
    assert await observer.fetchval("SELECT count(*) FROM items") == 0


async def test_a_middleware_that_tries_again_gets_a_session_for_each_try(
    session_maker: async_sessionmaker[AsyncSession], engine: AsyncEngine, observer: Connection
) -> None:
    app = shop(session_maker)
    tries: list[int] = []
    get_db = create_db_dependency(session_maker)

    @app.post("/second-time-lucky")
    async def second_time_lucky(session: AsyncSession = Depends(get_db)) -> None:
        tries.append(1)
        session.add(User(id=len(tries)))
        await session.flush()
        if len(tries) == 1:
            raise KeyError

    app.add_middleware(_Retrying)
    async with served(app) as client:
        assert (await client.post("/second-time-lucky")).status_code == 200
    assert [row["id"] for row in await observer.fetch("SELECT id FROM users")] == [2]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


class _Retrying:
    """Runs the application again, with the same scope, when its handler has raised."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        except KeyError:
            await self._app(scope, receive, send)


ABANDONS = """
import asyncio, gc, os, sys, warnings
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from coord import create_db_dependency

warnings.simplefilter("error")

async def main(kind, steps):
    engine = create_async_engine(os.environ["COORD_DATABASE_URL"], pool_size=1, max_overflow=0)
    get_db = create_db_dependency(session_maker=async_sessionmaker(engine))
    async for session in get_db():
        if kind == "begun":
            await session.begin()
        if kind == "used":
            await session.execute(text("SELECT 1"))
        break
    del session
    for _ in range(steps):
        await asyncio.sleep(0)
    if kind == "used":
        while engine.pool.checkedout():
            await asyncio.sleep(0.01)
    await engine.dispose()

for steps in range(4):
    print("left after", steps, flush=True)
    asyncio.run(main(sys.argv[1], steps))
    gc.collect()
"""


@pytest.mark.parametrize("kind", ["untouched", "begun", "used"])
async def test_a_loop_over_the_dependency_may_be_left_at_any_moment_without_a_warning(
    database_url: str, kind: str
) -> None:
    status, out, said = await warm.ended("-c", ABANDONS, kind, env={**os.environ, "COORD_DATABASE_URL": database_url})
    assert (status, said) == (0, ""), out
    assert out.splitlines()[-1] == "left after 3"
