"""Where a 202 leads: the job for whoever has its id, and an OpenAPI document that says what is sent."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from coord import JobState, create_db_dependency, enqueue
from coord.http import (
    Accepted,
    Idempotency,
    Reply,
    RequestLimits,
    idempotency,
    job_status_routes,
    problem_handlers,
    problems,
    replies,
    reply,
)
from tests.contract import Contract
from tests.counter import PROBLEM, end, runs, user
from tests.ledger import a_task, committed
from tests.serving import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from sqlalchemy.ext.asyncio import async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("ledger")


class AcceptedThing(Accepted):
    thing: int


def application(maker: SessionMaker) -> FastAPI:
    """With the defaults, and no more declared than the page on HTTP says."""
    app = FastAPI(exception_handlers=problem_handlers(), responses=problems())
    app.add_middleware(RequestLimits)
    get_db, keyed = create_db_dependency(maker), idempotency(caller=user)
    app.include_router(job_status_routes(get_db))

    @app.post("/things/{number}", responses=replies(AcceptedThing) | problems(400))
    async def act(
        number: int,
        once: Idempotency = Depends(keyed),
        reply: Reply = Depends(reply),
        session: AsyncSession = Depends(get_db),
    ) -> Any:
        job = await once.enqueue(session, a_task, number)
        await session.commit()
        return await reply.accepted(session, job, location=f"/jobs/{job.id}", thing=number)

    @app.post("/plain", responses=replies())
    async def plain(reply: Reply = Depends(reply), session: AsyncSession = Depends(get_db)) -> Any:
        job = await enqueue(session, a_task, 1)
        await session.commit()
        return await reply.accepted(session, job, location=f"/jobs/{job.id}")

    return app


@pytest.fixture
async def http(session_maker: SessionMaker) -> AsyncIterator[httpx.AsyncClient]:
    async with served(application(session_maker)) as client:
        yield client


@pytest.mark.parametrize("path", ["/things/7", "/plain"])
async def test_a_202_leads_to_its_job(http: httpx.AsyncClient, path: str) -> None:
    accepted = await http.post(path)
    assert accepted.status_code == 202
    found = await http.get(accepted.headers["location"])
    job = accepted.json()["job"]
    assert found.json() == {**job, "task": "a_task", "attempt": 1, "error": None}


@pytest.mark.parametrize(
    ("state", "error", "told"),
    [
        (JobState.DONE, None, None),
        (JobState.CANCELLED, None, None),
        (JobState.FAILED, "OutOfTea: none is left", "OutOfTea: none is left"),
        (JobState.FAILED, "OSError: [Errno 2] '/srv/s3cret'\nand more", "OSError"),
    ],
)
async def test_a_job_shows_its_final_state_and_no_internals_of_its_error(
    http: httpx.AsyncClient, session_maker: SessionMaker, state: JobState, error: str | None, told: str | None
) -> None:
    job = await committed(session_maker, a_task)
    await end(session_maker, job, state, error)
    answer = (await http.get(f"/jobs/{job.id}")).json()
    assert (answer["state"], answer["error"]) == (state, told)


async def test_a_job_that_a_worker_says_it_runs_is_running(
    http: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    job = await committed(session_maker, a_task)
    await runs(session_maker, job)
    assert (await http.get(f"/jobs/{job.id}")).json()["state"] == "running"


REQUESTS: list[tuple[str, str, dict[str, str], int]] = [
    ("POST", "/things/7", {}, 202),
    ("POST", "/things/7", {"Prefer": "respond-async", "Idempotency-Key": "a"}, 202),
    ("POST", "/things/7", {"Idempotency-Key": "("}, 400),
    ("POST", "/things/x", {}, 422),
    ("POST", "/plain", {}, 202),
    ("POST", "/plain", {"x": "y" * 20_000}, 431),
    ("GET", "/jobs/x", {}, 422),
    ("GET", f"/jobs/{uuid.UUID(int=0)}", {}, 404),
]


@pytest.mark.parametrize(("method", "path", "headers", "status"), REQUESTS)
async def test_the_document_declares_what_is_sent(
    http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    document = (await http.get("/openapi.json")).json()
    answer = await http.request(method, path, headers=headers)
    assert answer.status_code == status
    Contract(document).check(method, path, status, answer.headers, answer.content)


async def test_every_422_is_declared_as_a_problem_and_every_202_as_one_that_leads_to_a_route(
    http: httpx.AsyncClient,
) -> None:
    document = (await http.get("/openapi.json")).json()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert [*operation["responses"]["422"]["content"]] == [PROBLEM]
    assert "HTTPValidationError" not in str(document)
    for path, model in (("/things/{number}", "AcceptedThing"), ("/plain", "Accepted")):
        accepted = document["paths"][path]["post"]["responses"]["202"]
        assert accepted["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{model}"}
        assert {"Location", "Retry-After"} <= {*accepted["headers"]}
    assert "/jobs/{job_id}" in document["paths"]


class Answer(BaseModel):
    id: int


@pytest.mark.parametrize("model", [Answer, BaseModel])
def test_replies_refuses_a_model_that_is_no_accepted(model: Any) -> None:
    with pytest.raises(ValueError, match="response_model"):
        replies(model)
