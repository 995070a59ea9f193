"""The ends that a worker writes: in any encoding, after a lock that somebody has had for long, and of a task that
somebody else has cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from arq.worker import Retry
from sqlalchemy import make_url, select, text, update

import coord.worker.failure
import coord.worker.finalizer
from coord import cancel_job, create_ledger, job_transaction, list_attempts, lock_tables, retry_job
from coord.jobs.model import attempts, cancellations
from coord.worker.maintenance.canceller import Canceller
from tests.models import User
from tests.serving import eventually
from tests.shop import dsn_of
from tests.workers import Office, opened, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ARROW = "→ \N{GRINNING FACE}"


@pytest.fixture
async def latin1(database_url: str, redis_url: str) -> AsyncIterator[Office]:
    """A database that has no arrows, with its ledger."""
    name = f"coord_latin1_{uuid.uuid4().hex[:12]}"
    server = await asyncpg.connect(dsn_of(database_url))
    await server.execute(f"""CREATE DATABASE "{name}" ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0""")
    url = make_url(database_url).set(database=name).render_as_string(hide_password=False)
    try:
        async with opened(url, redis_url) as office:
            await office.redis.flushdb()
            async with office.session_maker.begin() as session:
                await create_ledger(await session.connection())
            yield office
    finally:
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


@pytest.mark.parametrize("end", ["fails", "is tried again", "returns", "returns after its effect", "is not known"])
async def test_an_end_that_the_databases_encoding_lacks_is_stored_escaped(latin1: Office, end: str) -> None:
    """Once, and the job comes to it."""

    async def task(ctx: dict[str, Any]) -> str:
        if end == "fails":
            raise ValueError(ARROW)
        if end == "is tried again" and ctx["job_try"] == 1:
            raise ConnectionResetError(ARROW)
        if end == "returns after its effect":
            async with job_transaction(ctx):
                """Nothing."""
        return ARROW

    async with working(latin1, [task], unknown_after=0):
        if end == "is not known":
            row = await latin1.final(await latin1.enqueue("unknown", reason=ARROW), within=20)
            assert row.state == "failed"
            return
        row = await latin1.final(job := await latin1.enqueue(task))
        if end.startswith("returns"):
            found = await eventually(lambda: result_of(latin1, job))
            assert (row.state, row.attempt, found) == ("done", 1, ARROW)
            return
    assert (row.state, row.attempt) == (("failed", 1) if end == "fails" else ("done", 2))
    assert "\\u2192 \\U0001f600" in row.error
    assert "\\u2192" in row.traceback
    async with latin1.session_maker() as session:
        recorded = [*await session.scalars(select(attempts.c.error).where(attempts.c.job_id == job.id))]
    assert recorded == [row.error]


async def result_of(office: Office, job: Any) -> Any:
    return (await office.row(job)).result


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("patience", [0.0, 900.0])
async def test_a_lock_is_waited_for_by_time_and_not_by_attempts_alone(
    office: Office, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, patience: float
) -> None:
    """Maintenance has a table for minutes: a job that has used its attempts up by then goes on, and says so."""
    monkeypatch.setattr(coord.worker.failure, "PAUSE_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(coord.worker.finalizer, "LOCK_PATIENCE_SECONDS", patience)

    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [User], timeout=0.02):
            """Nothing."""

    async with working(office, [task], max_tries=2):
        async with office.session_maker.begin() as vacuum:
            await vacuum.execute(text("LOCK TABLE users IN SHARE UPDATE EXCLUSIVE MODE"))
            job = await office.enqueue(task)

            async def has_gone_on() -> bool:
                row = await office.row(job)
                return bool(row.state.is_final or row.attempt > 4)

            await eventually(has_gone_on, within=20)
        row = await office.final(job)
    if patience:
        assert row.state == "done"
        assert row.attempt > 4
        assert "s for a lock, and goes on" in caplog.text
    else:
        assert (row.state, row.attempt) == ("failed", 2)
        assert "(attempt 2 of 2)" in row.error
        assert "goes on" not in caplog.text


@pytest.mark.usefixtures("tables")
async def test_a_job_that_is_run_again_by_hand_waits_for_a_lock_as_long_as_a_new_one(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long ago it failed for the first time."""
    monkeypatch.setattr(coord.worker.failure, "PAUSE_SECONDS", (0.02, 0.05))

    async def task(ctx: dict[str, Any]) -> None:
        if ctx["job_try"] == 1:
            raise ValueError("yesterday")
        async with job_transaction(ctx) as session, lock_tables(session, [User], timeout=0.02):
            """Nothing."""

    async with working(office, [task], max_tries=2):
        job = await office.enqueue(task)
        assert (await office.final(job)).state == "failed"
        async with office.session_maker.begin() as vacuum:
            await vacuum.execute(text("LOCK TABLE users IN SHARE UPDATE EXCLUSIVE MODE"))
            async with office.session_maker.begin() as session:
                await session.execute(update(attempts).values(began=datetime.now(UTC) - timedelta(days=1)))
                await retry_job(session, job.id)

            async def has_gone_on() -> bool:
                row = await office.row(job)
                return bool(row.state.is_final or row.attempt > 4)

            await eventually(has_gone_on, within=20)
        assert (await office.final(job)).state == "done"


@pytest.mark.parametrize("place", ["outside", "in its transaction"])
async def test_a_task_that_somebody_else_has_cancelled_is_handed_back(office: Office, place: str) -> None:
    """No attempt is used up, and nothing of it stays; its second run is the same attempt."""
    begun: list[int] = []
    go = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if place == "in its transaction":
                await stack.enter_async_context(job_transaction(ctx))
            begun.append(ctx["job_try"])
            await go.wait()

    async with working(office, [task]) as worker:
        job = await office.enqueue(task)
        await eventually(lambda: begun)
        (attempt,) = [running for running in asyncio.all_tasks() if running.get_name() == f"coord job {job.id}"]
        attempt.cancel()
        await eventually(lambda: len(begun) == 2)
        go.set()
        row = await office.final(job)
        assert worker.lives
    assert (row.state, row.attempt, row.hand_backs, row.error) == ("done", 1, 1, None)
    assert begun == [1, 1]


@pytest.mark.parametrize(
    "error", [ValueError("cannot tidy up"), ConnectionResetError("cannot tidy up"), ExceptionGroup("", [ValueError()])]
)
async def test_a_task_that_fails_as_its_stopping_worker_cancels_it_is_handed_back(
    office: Office, error: Exception
) -> None:
    """What it was cancelled for is a deploy, which uses up no attempt."""
    begun = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise error from None

    async with working(office, [task], grace=0):
        job = await office.enqueue(task)
        await begun.wait()
    row = await office.row(job)
    assert (row.state, row.attempt, row.hand_backs, row.error) == ("queued", 1, 1, None)


async def test_a_job_that_was_cancelled_as_its_attempt_failed_is_not_tried_again(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker has had no time to stop it; put off for an hour, it would be unfinished for an hour."""

    async def no_round(_: Canceller) -> None: ...

    monkeypatch.setattr(Canceller, "round", no_round)

    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx):
            async with office.session_maker() as session:
                assert await cancel_job(session, uuid.UUID(ctx["job_id"])) == "running"
                await session.commit()
            raise Retry(defer=3600)

    async with working(office, [task]):
        job = await office.enqueue(task)
        row = await office.final(job)
        await office.nothing_left_in_redis()
    assert (row.state, row.attempt) == ("cancelled", 1)
    async with office.session_maker() as session:
        assert [tried.error for tried in await list_attempts(session, job.id)] == ["Retry: <Retry defer 3600.00s>"]
        assert (await session.scalars(select(cancellations.c.job_id))).all() == []
