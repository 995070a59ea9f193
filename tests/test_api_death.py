"""The API is killed between `enqueue` and the answer: either nothing was asked for, or it is done, once."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from arq.worker import func
from sqlalchemy import select, text

from coord import Job, job_transaction
from tests.serving import eventually
from tests.shop import SERVING, Network, running
from tests.workers import Office, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from tests.shop import Command

API = ("uvicorn", "tests.dying_app:app", "--port", "0")
PREPARE = [
    "CREATE TABLE asked (job uuid)",
    (
        "CREATE FUNCTION commit_slowly() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END'"
    ),
    (
        "CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON asked DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION commit_slowly()"
    ),
]
CLEAR = ["DROP TABLE asked", "DROP FUNCTION commit_slowly"]


@pytest.fixture
async def asked(office: Office) -> AsyncIterator[None]:
    """What requests write beside their jobs, which takes a while to commit."""
    for statements in (PREPARE, CLEAR):
        async with office.session_maker.begin() as session:
            for statement in statements:
                await session.execute(text(statement))
        if statements is PREPARE:
            yield


async def ask(api: Command) -> httpx.Response:
    url = (await api.says(SERVING))[1]
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
        return await client.post("/do", headers={"Idempotency-Key": "one"})


async def asked_for(office: Office) -> list[UUID]:
    async with office.session_maker() as session:
        return [*await session.scalars(text("SELECT job FROM asked"))]


@pytest.mark.slow
@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("step", "committed"),
    [
        ("enqueued", False),
        ("committing", None),
        ("committed", True),
        ("committed, without Redis", True),
        ("running", True),
        ("answering", True),
    ],
)
async def test_what_was_asked_for_is_done_once_wherever_the_api_died(
    office: Office, step: str, committed: bool | None
) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        started.set()
        if step == "running":
            await go_on.wait()
        async with job_transaction(ctx) as session:
            await session.execute(text("INSERT INTO effects (job) VALUES (:job)"), {"job": ctx["job_id"]})

    network = Network(office.redis_url)
    network.up = not step.endswith("without Redis")
    async with network.opened(), working(office, [func(task, name="task")]):
        mortal = running(API, office.database_url, network.url, COORD_TEST_STEP=step.partition(",")[0])
        async with mortal as api, running(API, office.database_url, office.redis_url) as another:
            asking = asyncio.create_task(ask(api))
            if step == "running":
                await eventually(lambda: started.is_set(), within=20)
                api.process.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                await asking
            go_on.set()
            assert await api.exit_status() == -signal.SIGKILL
            before = await asked_for(office)
            if committed is not None:
                assert bool(before) is committed
            answer = await ask(another)
        job, *others = await asked_for(office)
        assert (answer.json(), others) == ({"job": str(job), "state": "done"}, [])
        assert before in ([], [job])
        async with office.session_maker() as session:
            assert [*await session.scalars(text("SELECT job FROM effects"))] == [job]
            assert [*await session.scalars(select(Job.id))] == [job]
