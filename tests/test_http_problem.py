"""Whatever is raised is answered with a problem document of the right status, which says nothing of the inside."""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

import coord
from coord import create_db_dependency
from coord.http import HeadRequests, problem, problem_handlers, problems, public_reason
from coord.http.problem import KINDS
from tests.counter import PROBLEM, URN
from tests.serving import engine_at, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import httpx
    from sqlalchemy.ext.asyncio import AsyncEngine

JOB = uuid.uuid4()
SECRET = "s3cret"
RAISED: list[tuple[Exception, int, str]] = [
    (coord.RowNotFoundError(SECRET), 404, "not-found"),
    (coord.UniqueKeyConflictError(SECRET), 409, "unique-key-conflict"),
    (coord.JobCancelledError(SECRET, job_id=JOB), 409, "job-cancelled"),
    (coord.JobFailedError(SECRET, job_id=JOB, reason="OutOfTea: none is left"), 500, "job-failed"),
    (coord.TooManyWaitersError(SECRET), 503, "too-many-waiters"),
    (coord.LockTimeoutError(SECRET, tables=[SECRET]), 503, "lock-timeout"),
    (coord.DeadlockError(SECRET), 503, "deadlock"),
    (coord.WaitTimeoutError(SECRET, model=BaseModel, pk_value=SECRET, waited=1.0), 503, "wait-timeout"),
    (PoolTimeoutError(SECRET), 503, "busy"),
]


class Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = 0


class Fallible:
    """A service that does what a test has it do."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.act: Callable[[], Any] = lambda: None

    async def answer_to(self, act: Callable[[], Any] | Exception) -> httpx.Response:
        self.act = act if not isinstance(act, Exception) else lambda: _raise(act)
        return await self.client.get("/")


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture(scope="module")
async def fallible() -> AsyncIterator[Fallible]:
    app = FastAPI(exception_handlers=problem_handlers())

    @app.get("/")
    async def fail() -> Any:
        return service.act()

    @app.post("/exact")
    async def exact(exact: Exact) -> None: ...

    @app.post("/numbers")
    async def numbers(numbers: list[int]) -> None: ...

    async with served(app) as client:
        service = Fallible(client)
        yield service


@pytest.mark.parametrize(("error", "status", "kind"), RAISED, ids=[kind for _, _, kind in RAISED])
async def test_an_error_of_coord_has_its_own_problem(
    fallible: Fallible, error: Exception, status: int, kind: str
) -> None:
    answer = await fallible.answer_to(error)
    body = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert (body["status"], body["type"]) == (status, f"{URN}{kind}")
    assert body["title"]
    assert body["detail"]
    assert SECRET not in answer.text
    assert (int(answer.headers.get("retry-after", 0)) >= 1) == (status == 503)
    declared = problems(status)[status]["content"][PROBLEM]["schema"]["properties"]
    assert body["type"] in declared["type"]["enum"]


def test_every_error_of_coord_is_on_the_list() -> None:
    """But for the two that are bugs."""
    errors = {getattr(coord, name) for name in coord.__all__}
    known = {error for error in errors if isinstance(error, type) and issubclass(error, coord.CoordError)}
    assert known - {type(error) for error, _, _ in RAISED} == {coord.CoordError, coord.UncommittedChangesError}


async def test_a_failed_job_is_answered_with_its_reason_and_its_id(fallible: Fallible) -> None:
    answer = await fallible.answer_to(coord.JobFailedError(job_id=JOB, reason="OutOfTea: none is left"))
    assert (answer.json()["detail"], answer.json()["job"]) == ("OutOfTea: none is left", str(JOB))


INTERNAL = [
    (
        "ProgrammingError: (sqlalchemy.dialects.postgresql.asyncpg.ProgrammingError) <class 'asyncpg.exceptions."
        'UndefinedTableError\'>: relation "s3cret" does not exist [SQL: SELECT s3cret FROM s3cret]'
    ),
    'UndefinedTableError: relation "s3cret" does not exist',
    "FileNotFoundError: [Errno 2] No such file or directory: '/srv/s3cret/key.pem'",
    "ConnectionRefusedError: [Errno 111] Connect call failed ('10.1.2.3', 5432), s3cret",
    "ValueError: cannot parse postgresql+asyncpg://shop:s3cret@db/shop",
    'InvalidPasswordError: password authentication failed for user "s3cret"',
    "RuntimeError: see /etc/s3cret",
    "RuntimeError: <object at 0x7f00aabbccdd> s3cret",
    'RuntimeError: File "s3cret.py", line 3',
    "LockTimeoutError: timed out waiting for advisory lock 's3cret': held by pid 7",
]


@pytest.mark.parametrize("reason", INTERNAL)
async def test_the_reason_of_a_failed_job_shows_no_internals(fallible: Fallible, reason: str) -> None:
    answer = await fallible.answer_to(coord.JobFailedError(job_id=JOB, reason=reason))
    assert SECRET not in answer.text
    assert answer.json()["detail"] == reason.split(":")[0]


@pytest.mark.parametrize("reason", ["OutOfTea: 3 of 5 are left", "ValueError: not and/or but 1/2", "gave up", ""])
def test_a_reason_without_internals_is_shown_as_it_is(reason: str) -> None:
    assert public_reason(reason) == reason
    assert public_reason(None) is None


@pytest.mark.parametrize(
    "error", [coord.UncommittedChangesError(SECRET), coord.CoordError(SECRET), RuntimeError(SECRET), KeyError(SECRET)]
)
async def test_a_bug_is_a_500_that_only_the_log_explains(fallible: Fallible, error: Exception) -> None:
    answer = await fallible.answer_to(error)
    assert (answer.status_code, answer.headers["content-type"]) == (500, PROBLEM)
    assert answer.json()["type"] == "about:blank"
    assert SECRET not in answer.text
    assert "Traceback" not in answer.text


async def test_a_file_that_is_missing_is_a_bug_and_no_outage(fallible: Fallible) -> None:
    answer = await fallible.answer_to(Path("/no/such/s3cret").read_text)
    assert (answer.status_code, answer.json()["type"]) == (500, "about:blank")
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    ("error", "status", "detail", "more"),
    [
        (HTTPException(418, "short and stout"), 418, "short and stout", {}),
        (HTTPException(409, {"code": 3}), 409, "Conflict", {"errors": {"code": 3}}),
        (HTTPException(400, ["a", "b"]), 400, "Bad Request", {"errors": ["a", "b"]}),
        (HTTPException(460), 460, "", {}),
        (HTTPException(404), 404, "Not Found", {}),
        (HTTPException(404, "half a pair: \ud800"), 404, "half a pair: ?", {}),
    ],
)
async def test_an_http_exception_is_a_problem(
    fallible: Fallible, error: Exception, status: int, detail: str, more: dict[str, Any]
) -> None:
    answer = await fallible.answer_to(error)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    body = answer.json()
    assert {"status": status, "detail": detail, "type": "about:blank", **more}.items() <= body.items()
    assert body["title"]


@pytest.mark.parametrize("status", [204, 304])
async def test_a_status_without_a_body_has_none(fallible: Fallible, status: int) -> None:
    answer = await fallible.answer_to(HTTPException(status, headers={"ETag": '"1"'}))
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (status, b"", '"1"')


async def test_headers_of_an_exception_are_sent(fallible: Fallible) -> None:
    answer = await fallible.answer_to(HTTPException(503, "later", {"Retry-After": "120"}))
    assert answer.headers["retry-after"] == "120"


def test_a_problem_of_ones_own_has_a_type_a_title_and_members() -> None:
    answer = problem(409, "all is sold", kind="sold-out", left=0)
    assert answer.status_code == 409
    assert json.loads(bytes(answer.body)) == {
        "type": f"{URN}sold-out",
        "title": "Sold out",
        "status": 409,
        "detail": "all is sold",
        "left": 0,
    }


@pytest.mark.parametrize(
    "body",
    [
        *(b'{"number": NaN}', b'{"number": "\\ud800"}', b'{"\\ud800": 1}', b"{", b"\xff\xfe", b"[" * 100_000),
        b'{"number": ' + b"9" * 5_000 + b"}",
    ],
)
async def test_an_invalid_body_is_a_422(fallible: Fallible, body: bytes) -> None:
    answer = await fallible.client.post("/exact", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    assert answer.json()["type"] == f"{URN}invalid"
    assert answer.json()["detail"]


async def test_an_invalid_body_lists_at_most_twenty_errors(fallible: Fallible) -> None:
    answer = await fallible.client.post("/numbers", json=["x"] * 1_000)
    assert answer.status_code == 422
    assert 1 <= len(answer.json()["errors"]) <= 20
    assert answer.json()["errors"][0]["where"] == ["body", "0"]


async def nothing() -> None: ...


async def test_allow_lists_the_methods_of_all_routes_of_a_resource() -> None:
    app = FastAPI(exception_handlers=problem_handlers())
    app.add_middleware(HeadRequests)
    app.get("/things/{number}")(nothing)
    app.put("/things/{number}")(nothing)
    app.delete("/things/{number}")(nothing)
    router = APIRouter(prefix="/inner")
    router.post("/things")(nothing)
    router.patch("/things")(nothing)
    app.include_router(router, prefix="/outer")
    mounted = FastAPI(exception_handlers=problem_handlers())
    mounted.get("/things")(nothing)
    mounted.post("/things")(nothing)
    app.mount("/mounted", mounted)
    expected = {
        "/things/3": ["GET", "HEAD", "PUT", "DELETE"],
        "/outer/inner/things": ["POST", "PATCH"],
        "/mounted/things": ["GET", "HEAD", "POST"],
    }
    async with served(app) as client:
        for path, methods in expected.items():
            answer = await client.request("TRACE", path)
            assert (answer.status_code, answer.headers["content-type"]) == (405, PROBLEM)
            assert answer.headers["allow"] == ", ".join(methods)
        assert (await client.head("/outer/inner/things")).headers["allow"] == "POST, PATCH"
        assert (await client.get("/nowhere")).json()["type"] == "about:blank"


def asking(engine: AsyncEngine, *statements: str) -> FastAPI:
    app = FastAPI(exception_handlers=problem_handlers())
    get_db = create_db_dependency(async_sessionmaker(engine))

    @app.get("/")
    async def ask(session: AsyncSession = Depends(get_db)) -> None:
        for statement in statements:
            await session.execute(text(statement))

    return app


async def test_a_database_that_is_not_there_is_a_503_and_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    engine = create_async_engine(f"postgresql+asyncpg://shop:{SECRET}@127.0.0.1:1/shop")
    with caplog.at_level(logging.WARNING, "coord.http"):
        async with served(asking(engine, "SELECT 1")) as client:
            answer = await client.get("/")
    assert (answer.status_code, answer.json()["type"]) == (503, f"{URN}database-away")
    assert int(answer.headers["retry-after"]) >= 1
    assert "127.0.0.1" not in answer.text
    lines = [record.getMessage() for record in caplog.records if record.name == "coord.http"]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert SECRET not in lines[0]


async def test_a_lost_connection_is_a_503_without_the_statement_anywhere(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    statement = f"SELECT pg_terminate_backend(pg_backend_pid()), '{SECRET}'"
    async with served(asking(engine, statement)) as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()["type"]) == (503, f"{URN}database-away")
    assert SECRET not in answer.text + caplog.text


async def test_a_refused_statement_is_a_500_that_does_not_show_it(engine: AsyncEngine) -> None:
    async with served(asking(engine, f"SELECT {SECRET}")) as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()["type"]) == (500, "about:blank")
    assert SECRET not in answer.text


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03"])
async def test_contention_is_a_503_that_blames_no_outage(engine: AsyncEngine, state: str) -> None:
    statement = f"DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING ERRCODE = '{state}'; END $$"
    async with served(asking(engine, statement)) as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()["type"]) == (503, f"{URN}contention")
    assert int(answer.headers["retry-after"]) >= 1
    assert SECRET not in answer.text


async def test_a_server_that_takes_no_more_connections_is_a_503(fallible: Fallible) -> None:
    answer = await fallible.answer_to(asyncpg.TooManyConnectionsError(SECRET))
    assert (answer.status_code, answer.json()["type"]) == (503, f"{URN}database-away")


async def test_an_exhausted_pool_is_a_503(database_url: str) -> None:
    async with (
        engine_at(database_url, pool_size=1, max_overflow=0, pool_timeout=0.1) as engine,
        engine.connect(),
        served(asking(engine, "SELECT 1")) as client,
    ):
        answer = await client.get("/")
    assert (answer.status_code, answer.json()["type"]) == (503, f"{URN}busy")
    assert int(answer.headers["retry-after"]) >= 1


def test_every_type_of_problem_is_declared_under_its_status() -> None:
    for kind in KINDS:
        declared = problems(kind.status)[kind.status]["content"][PROBLEM]["schema"]["properties"]
        assert f"{URN}{kind.name}" in declared["type"]["enum"]
        assert declared["status"]["const"] == kind.status
    assert problems(503)[503]["headers"]["Retry-After"]["required"]
    assert len({kind.name for kind in KINDS}) == len(KINDS)
