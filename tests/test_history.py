"""What is kept of the attempts at a job: a row for each that did not succeed, none for the one that did, a result."""

from __future__ import annotations

import asyncio
import os
import socket
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from arq.worker import Retry
from sqlalchemy import text

from coord import cancel_job, get_job, job_transaction, list_attempts, set_result
from coord.worker.maintenance.pruner import Pruner
from tests.serving import eventually
from tests.workers import Office, a_state, working

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.usefixtures("tables")


async def test_each_attempt_that_did_not_succeed_leaves_a_row_and_the_others_none(
    office: Office, engine: AsyncEngine, observer: Connection
) -> None:
    async def task(ctx: dict[str, Any]) -> str:
        async with job_transaction(ctx) as session:
            if ctx["job_try"] == 1:
                raise Retry(defer=0.01)
            if ctx["job_try"] == 2:
                await session.execute(text("SELECT 1/0"))
        return "at last"

    before = datetime.now(UTC)
    async with working(office, [task]):
        job = await office.enqueue(task)
        assert (await office.final(job)).state == "failed"
        async with office.session_maker() as session:
            first, second = await list_attempts(session, job.id)
            assert await list_attempts(session, uuid4()) == []
        [worker] = await office.workers()
    assert (first.number, first.outcome, second.number, second.outcome) == (1, "retried", 2, "failed")
    assert "Retry" in str(first.error)
    assert "division by zero" in str(second.error)
    assert "1/0" in str(second.traceback)
    assert first.began is not None
    assert before < first.began <= first.ended + timedelta(seconds=1) <= datetime.now(UTC) + timedelta(seconds=1)
    assert (second.worker, second.host, second.pid) == (worker.id, socket.gethostname(), os.getpid())
    await observer.execute("UPDATE coord_jobs SET finished_at = finished_at - interval '1 day'")
    assert await Pruner(a_state(engine, keep=0)).prune() == 1
    assert await observer.fetchval("SELECT count(*) FROM coord_attempts") == 0


async def test_an_attempt_that_is_cancelled_leaves_a_row(office: Office) -> None:
    begun = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with working(office, [task]):
        job = await office.enqueue(task)
        await begun.wait()
        async with office.session_maker() as session:
            await session.execute(text("SELECT FROM coord_jobs FOR UPDATE"))  # as a job_transaction would have it
            async with office.session_maker() as other:
                await cancel_job(other, job.id)
                await other.commit()
        assert (await office.final(job)).state == "cancelled"
    async with office.session_maker() as session:
        [attempt] = await list_attempts(session, job.id)
    assert (attempt.number, attempt.outcome, attempt.error) == (1, "cancelled", None)


@pytest.mark.parametrize("inside", [True, False], ids=["set inside the block", "returned"])
async def test_a_result_is_kept(office: Office, inside: bool) -> None:
    async def task(ctx: dict[str, Any]) -> Any:
        async with job_transaction(ctx) as session:
            if inside:
                await set_result(session, {"invoice": 7})
        return None if inside else {"invoice": 7}

    async with working(office, [task]):
        job = await office.enqueue(task)
        await office.final(job)

        async def kept() -> bool:
            return bool((await office.row(job)).result == {"invoice": 7})

        await eventually(kept)
    async with office.session_maker() as session:
        assert (await get_job(session, job.id)).result == {"invoice": 7}
