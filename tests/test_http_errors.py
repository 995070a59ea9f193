"""Errors as a browser and a client of another origin see them: conflicts, wrong servers, and the headers of CORS."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord import create_db_context, create_db_dependency
from coord.dev.embedded import PostgreSQL
from coord.http import RequestLimits, problem, problem_handlers
from tests.clusters import lay
from tests.counter import PROBLEM, URN
from tests.raw import call
from tests.serving import engine_at, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx
    from fastapi import Request
    from sqlalchemy.ext.asyncio import AsyncEngine

SECRET = "s3cret"
TABLE = f"""
    CREATE EXTENSION IF NOT EXISTS btree_gist;
    DROP TABLE IF EXISTS {SECRET};
    CREATE TABLE {SECRET} (
        id int PRIMARY KEY, name text CONSTRAINT s3cret_name UNIQUE DEFERRABLE INITIALLY DEFERRED, day int, late int,
        EXCLUDE USING gist (day WITH =), EXCLUDE USING gist (late WITH =) DEFERRABLE INITIALLY DEFERRED,
        even int CHECK (even % 2 = 0)
    );
    INSERT INTO {SECRET} VALUES (1, 'a', 1, 1, 2)
"""
ROWS = {
    "unique": "(1, 'b', 2, 2, 2)",
    "unique, at the commit": "(2, 'a', 2, 2, 2)",
    "exclusion": "(2, 'b', 1, 2, 2)",
    "exclusion, at the commit": "(2, 'b', 2, 1, 2)",
}


@pytest.fixture
async def conflicting(engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with engine.begin() as connection:
        for statement in TABLE.split(";"):
            await connection.execute(text(statement))
    maker = async_sessionmaker(engine)
    get_db, db_context = create_db_dependency(maker), create_db_context(maker)
    app = FastAPI(exception_handlers=problem_handlers())

    async def insert(session: AsyncSession, row: str) -> None:
        await session.execute(text(f"INSERT INTO {SECRET} VALUES {row}"))

    @app.post("/dependency")
    async def by_dependency(row: str, session: AsyncSession = Depends(get_db)) -> None:
        await insert(session, row)

    @app.post("/function")
    async def by_function(row: str, session: AsyncSession = Depends(get_db, scope="function")) -> None:
        await insert(session, row)

    @app.post("/handler")
    async def by_handler(row: str, session: AsyncSession = Depends(get_db)) -> None:
        await insert(session, row)
        await session.commit()

    @app.post("/context")
    async def by_context(row: str) -> None:
        async with db_context() as session:
            await insert(session, row)

    async with served(app) as client:
        yield client
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE {SECRET}"))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("path", ["/dependency", "/function", "/handler", "/context"])
async def test_what_a_constraint_excludes_is_a_409_without_names(
    conflicting: httpx.AsyncClient, path: str, row: str
) -> None:
    answer = await conflicting.post(path, params={"row": row})
    assert (answer.status_code, answer.headers["content-type"]) == (409, PROBLEM)
    assert answer.json()["type"] == f"{URN}conflict"
    assert SECRET not in answer.text
    assert (await conflicting.post(path, params={"row": "(9, 'z', 9, 9, 2)"})).status_code == 200


async def test_a_check_violation_stays_a_500(conflicting: httpx.AsyncClient) -> None:
    answer = await conflicting.post("/dependency", params={"row": "(3, 'c', 3, 3, 3)"})
    assert (answer.status_code, answer.json()["type"]) == (500, "about:blank")
    assert SECRET not in answer.text


WRITES = ["CREATE TABLE t ()", "DELETE FROM written", "INSERT INTO written VALUES (1)"]


def writing(engine: AsyncEngine) -> FastAPI:
    app = FastAPI(exception_handlers=problem_handlers())
    get_db = create_db_dependency(async_sessionmaker(engine))

    @app.post("/")
    async def write(statement: str, session: AsyncSession = Depends(get_db)) -> Any:
        result: Any = await session.execute(text(statement))
        return result.scalar() if result.returns_rows else None

    return app


@pytest.mark.parametrize("kind", ["a standby", "a read-only server"])
async def test_a_server_that_only_reads_is_away_and_its_connections_are_given_up(tmp_path: Path, kind: str) -> None:
    """As after a failover: the address leads to a server that is no primary any more."""
    with PostgreSQL(lay(tmp_path)) as server:
        async with engine_at(server.url) as engine, engine.begin() as connection:
            await connection.execute(text("CREATE TABLE written (id int)"))
            if kind == "a read-only server":
                await connection.execute(text("ALTER DATABASE postgres SET default_transaction_read_only = on"))
    if kind == "a standby":
        (server.data / "standby.signal").touch()
    with PostgreSQL(tmp_path) as server:
        async with engine_at(server.url, pool_size=1, max_overflow=0) as engine, served(writing(engine)) as client:
            backends = []
            for statement in WRITES:
                backends.append((await client.post("/", params={"statement": "SELECT pg_backend_pid()"})).json())
                answer = await client.post("/", params={"statement": statement})
                assert (answer.status_code, answer.json()["type"]) == (503, f"{URN}database-away")
                assert int(answer.headers["retry-after"]) >= 1
            assert len({*backends}) == len(WRITES)


async def test_a_transaction_that_asked_to_read_only_is_a_bug_of_its_own(engine: AsyncEngine) -> None:
    async with served(writing(engine)) as client:
        statement = "DO $$ BEGIN SET LOCAL transaction_read_only = on; CREATE TABLE t (); END $$"
        assert (await client.post("/", params={"statement": statement})).status_code == 500


ORIGIN = {"Origin": "https://shop.example"}


def with_cors(*, own_handler: bool = False) -> FastAPI:
    async def on_error(_request: Request, _error: Exception) -> Any:
        return problem(500, "an own handler")

    app = FastAPI(exception_handlers=problem_handlers() | ({Exception: on_error} if own_handler else {}))
    app.add_middleware(RequestLimits, wait=0.1, margin=0.1, body=100, head=2_000)
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN["Origin"]])

    @app.post("/body")
    async def body(body: dict[str, int]) -> None: ...

    @app.get("/bug")
    async def bug() -> None:
        raise KeyError(SECRET)

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(20)

    @app.get("/refused")
    async def refused() -> None:
        raise HTTPException(418)

    return app


ERRORS: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "size of the body": (413, "POST", "/body", {"json": {"a" * 200: 1}}),
    "size of the head": (431, "GET", "/refused", {"headers": {"x": "y" * 3_000}}),
    "time": (503, "GET", "/slow", {}),
    "bug": (500, "GET", "/bug", {}),
    "validation": (422, "POST", "/body", {"json": {"a": "b"}}),
    "unknown path": (404, "GET", "/nowhere", {}),
    "method": (405, "PUT", "/bug", {}),
    "raised": (418, "GET", "/refused", {}),
}


@pytest.mark.parametrize("error", ERRORS)
async def test_a_page_of_another_origin_may_read_every_error(error: str) -> None:
    """With `CORSMiddleware` added last, so that it is outermost."""
    status, method, path, options = ERRORS[error]
    headers = ORIGIN | options.pop("headers", {}) if "headers" in options else ORIGIN
    async with served(with_cors()) as client:
        answer = await client.request(method, path, headers=headers, **options)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert answer.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert SECRET not in answer.text


async def test_a_page_of_another_origin_may_read_that_its_upload_took_too_long() -> None:
    headers = {**ORIGIN, "Content-Length": "50", "Content-Type": "application/json"}
    async with served(with_cors()) as client, call(str(client.base_url), "POST", "/body", headers) as slow:
        await slow.send(b"{")
        assert (await slow.begun()).status == 408
        assert slow.headers["access-control-allow-origin"] == ORIGIN["Origin"]


async def test_a_bug_is_answered_by_the_applications_own_handler_and_logged(capfd: pytest.CaptureFixture[str]) -> None:
    async with served(with_cors(own_handler=True)) as client:
        answer = await client.get("/bug", headers=ORIGIN)
    assert (answer.status_code, answer.json()["detail"]) == (500, "an own handler")
    assert answer.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert SECRET in capfd.readouterr().err
