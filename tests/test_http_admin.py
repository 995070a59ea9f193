"""Who may look after jobs over HTTP, and what they can do."""

from __future__ import annotations

import secrets
import uuid
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from coord import JobState, create_db_dependency, task_options
from coord.http import HeadRequests, job_routes, problem_handlers
from tests.counter import PROBLEM, URN, end, jobs_of
from tests.ledger import a_task, committed
from tests.serving import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("ledger")

TOKEN = "correct horse battery"
NOBODY = uuid.UUID(int=7)


def administration(maker: SessionMaker, token: str | None) -> FastAPI:
    app = FastAPI(exception_handlers=problem_handlers())
    app.add_middleware(HeadRequests)
    app.include_router(job_routes(create_db_dependency(maker), token=token))
    return app


@pytest.fixture(scope="module")
async def admin(session_maker: SessionMaker) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with served(administration(session_maker, TOKEN), headers=headers) as client:
        yield client


ROUTES = [("GET", ""), ("HEAD", ""), ("GET", "/{id}/details"), ("POST", "/{id}/cancel"), ("POST", "/{id}/retry")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer x y",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        "Bearer \xe9",
    ],
)
async def test_without_the_token_nothing_is_told_or_done(
    admin: httpx.AsyncClient, session_maker: SessionMaker, method: str, path: str, authorization: str | None
) -> None:
    job = await committed(session_maker, a_task, "secret")
    request = admin.build_request(method, f"/jobs{path.format(id=job.id)}")
    given = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
    request.headers = httpx.Headers([field for field in request.headers.raw if field[0] != b"Authorization"] + given)
    answer = await admin.send(request)
    assert (answer.status_code, answer.headers["content-type"]) == (401, PROBLEM)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "secret" not in answer.text
    assert [found.state for found in await jobs_of(session_maker)] == [JobState.QUEUED]


async def test_the_token_opens_and_is_compared_in_constant_time(
    admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []
    honest = secrets.compare_digest

    def noting(offered: bytes, token: bytes) -> bool:
        compared.append(offered)
        return honest(offered, token)

    monkeypatch.setattr(secrets, "compare_digest", noting)
    assert (await admin.get("/jobs")).status_code == 200
    assert (await admin.get("/jobs", headers={"Authorization": f"bearer {TOKEN}"})).status_code == 200
    assert (await admin.get("/jobs", headers={"Authorization": "Bearer no"})).status_code == 401
    assert compared == [TOKEN.encode(), TOKEN.encode(), b"no"]


async def test_a_token_may_be_of_any_letters(session_maker: SessionMaker) -> None:
    token = "Schlüssel-für-alle"
    async with served(administration(session_maker, token)) as client:
        answer = await client.get("/jobs", headers=[(b"Authorization", f"Bearer {token}".encode())])
    assert answer.status_code == 200


async def test_in_development_the_routes_are_open(session_maker: SessionMaker) -> None:
    async with served(administration(session_maker, None)) as client:
        assert (await client.get("/jobs")).json() == []


def test_a_short_token_is_refused(session_maker: SessionMaker) -> None:
    for token in ("", "x" * 15):
        with pytest.raises(ValueError, match="at least 16"):
            administration(session_maker, token)


async def test_jobs_are_listed_by_state_and_task_and_page_by_page(
    admin: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    first = await committed(session_maker, a_task, 1)
    second = await committed(session_maker, "other")
    third = await committed(session_maker, task_options(a_task, unique_key="k"), 3)
    await end(session_maker, second, JobState.FAILED, "OutOfTea")

    async def listed(**query: Any) -> list[str]:
        answer = await admin.get("/jobs", params=query)
        return [job["id"] for job in answer.raise_for_status().json()]

    assert await listed() == [str(job.id) for job in (third, second, first)]
    assert await listed(state="failed") == [str(second.id)]
    assert await listed(task="other") == [str(second.id)]
    assert await listed(task="a'; DROP TABLE coord_jobs; --") == []
    assert await listed(limit=1) == [str(third.id)]
    assert await listed(limit=1, before=str(third.id)) == [str(second.id)]
    assert await listed(state="running") == []


@pytest.mark.parametrize(
    "query", ["state=ill", "limit=0", "limit=1001", "limit=x", "before=x", "task=%00", f"task={'x' * 201}"]
)
async def test_a_list_of_what_cannot_be_is_refused(admin: httpx.AsyncClient, query: str) -> None:
    answer = await admin.get(f"/jobs?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)


async def test_details_tell_everything(admin: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    job = await committed(session_maker, task_options(a_task, unique_key="k"), 1, colour="red")
    answer = (await admin.get(f"/jobs/{job.id}/details")).json()
    assert (answer["arguments"], answer["unique_key"], answer["state"]) == ([[1], {"colour": "red"}], "k", "queued")
    assert answer["traceback"] is None
    assert answer["created_at"].endswith("Z")


async def test_a_job_is_cancelled_and_run_again(admin: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    job = await committed(session_maker, a_task)
    refused = await admin.post(f"/jobs/{job.id}/retry")
    assert (refused.status_code, refused.headers["content-type"]) == (409, PROBLEM)
    assert (await admin.post(f"/jobs/{job.id}/cancel")).json() == {"state": "cancelled"}
    assert (await admin.post(f"/jobs/{job.id}/cancel")).json() == {"state": "cancelled"}
    assert (await admin.post(f"/jobs/{job.id}/retry")).json() == {"state": "queued"}
    assert [(found.state, found.attempt) for found in await jobs_of(session_maker)] == [("queued", 2)]


async def test_a_job_whose_key_another_has_now_is_not_run_again(
    admin: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    job = await committed(session_maker, task_options(a_task, unique_key="k"))
    await admin.post(f"/jobs/{job.id}/cancel")
    await committed(session_maker, task_options(a_task, unique_key="k"))
    refused = await admin.post(f"/jobs/{job.id}/retry")
    assert (refused.status_code, refused.json()["type"]) == (409, f"{URN}unique-key-conflict")


@pytest.mark.parametrize(("method", "path"), ROUTES[2:])
@pytest.mark.parametrize(("job_id", "status"), [(str(NOBODY), 404), ("x", 422)])
async def test_a_job_that_is_not_there_is_a_problem(
    admin: httpx.AsyncClient, method: str, path: str, job_id: str, status: int
) -> None:
    answer = await admin.request(method, f"/jobs{path.format(id=job_id)}")
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)


async def test_what_json_can_say_and_text_cannot_is_told_all_the_same(
    admin: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    """Half a surrogate pair, of which one job would keep the whole list from who looks at it."""
    job = await committed(session_maker, a_task, "half: \ud800", whole="é")
    for answer in (await admin.get("/jobs"), await admin.get(f"/jobs/{job.id}/details")):
        assert answer.status_code == 200
        (told,) = found if isinstance(found := answer.json(), list) else [found]
        assert told["arguments"] == [["half: ?"], {"whole": "é"}]
