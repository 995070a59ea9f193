"""What the ledger and Redis forget: jobs that ended long ago, those that nobody wants any more, and expired keys."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine

import coord.worker.maintenance.pruner
from coord import cancel_job, retry_job, task_options
from coord.jobs.model import attempts, cancellations, jobs, keys
from coord.worker.maintenance.pruner import Pruner, _expired
from tests.ledger import a_task
from tests.serving import eventually
from tests.workers import a_state, working

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord import Job
    from tests.workers import Office

KEPT = timedelta(days=7)


async def aged(engine: AsyncEngine, age: timedelta, state: str, *, finished: timedelta | None = None) -> UUID:
    """A job that was enqueued so long ago, and ended at once or so long ago."""
    now = datetime.now(UTC)
    id_ = UUID(int=int((now - age).timestamp() * 1000) << 80 | uuid4().int & ((1 << 64) - 1))
    row = {"id": id_, "task": "a_task", "queue": "default", "arguments": [[], {}], "state": state}
    ended = now - (age if finished is None else finished)
    async with engine.begin() as connection:
        await connection.execute(insert(jobs), row | {"finished_at": ended})
    return id_


async def left(engine: AsyncEngine) -> set[UUID]:
    async with engine.connect() as connection:
        return {*await connection.scalars(select(jobs.c.id))}


def pruning(engine: AsyncEngine) -> Pruner:
    state = a_state(engine, keep=KEPT.total_seconds())
    state.leads_until = float("inf")
    return Pruner(state)


async def test_only_what_ended_long_ago_goes(ledger: None, engine: AsyncEngine) -> None:
    day = timedelta(days=1)
    for state in ("done", "failed", "cancelled"):
        await aged(engine, 8 * day, state)
    kept = {
        await aged(engine, 8 * day, "queued"),
        await aged(engine, 8 * day, "done", finished=day),
        *[await aged(engine, 6 * day, state) for state in ("done", "failed", "cancelled", "queued")],
    }
    assert await pruning(engine).prune() == 3
    assert await left(engine) == kept


async def test_it_goes_in_batches_whatever_the_plan(
    ledger: None, engine: AsyncEngine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once no more than some, so that nobody waits for it and vacuum keeps up."""
    monkeypatch.setattr(coord.worker.maintenance.pruner, "BATCH", 2)
    monkeypatch.setattr(coord.worker.maintenance.pruner, "BATCHES", 2)
    for _ in range(7):
        await aged(engine, 2 * KEPT, "done")
    methods = ("hashjoin", "mergejoin", "hashagg", "sort", "material", "memoize")
    settings = {f"enable_{method}": "off" for method in methods}
    loops = create_async_engine(database_url, connect_args={"server_settings": settings})
    counts = [await pruning(loops).prune() for _ in range(3)]
    await loops.dispose()
    assert counts == [4, 3, 0]


async def test_it_comes_back_soon_when_it_has_left_something(
    ledger: None, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four thousand a second may end, for good, and the ledger does not grow."""
    monkeypatch.setattr(coord.worker.maintenance.pruner, "BATCH", 2)
    monkeypatch.setattr(coord.worker.maintenance.pruner, "BATCHES", 2)
    for _ in range(7):
        await aged(engine, 2 * KEPT, "done")
    pruner = pruning(engine)
    assert await pruner.round() == coord.worker.maintenance.pruner.SOON_SECONDS
    assert await pruner.round() is None
    assert await left(engine) == set()


async def test_what_somebody_has_locked_waits_for_the_next_time(ledger: None, engine: AsyncEngine) -> None:
    one, two = [await aged(engine, 2 * KEPT, "done") for _ in range(2)]
    async with engine.begin() as connection:
        await connection.execute(select(jobs).where(jobs.c.id == one).with_for_update())
        async with asyncio.timeout(5):
            assert await pruning(engine).prune() == 1
        assert two not in await left(engine)
    assert await pruning(engine).prune() == 1


async def lent(engine: AsyncEngine, left: timedelta, count: int = 1) -> None:
    """Idempotency keys that expire in so long."""
    row = {"scope": "", "fingerprint": "", "job_id": None, "expires_at": datetime.now(UTC) + left}
    async with engine.begin() as connection:
        await connection.execute(insert(keys), [row | {"key": str(uuid4())} for _ in range(count)])


async def keys_left(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return await connection.scalar(select(func.count()).select_from(keys)) or 0


async def test_keys_that_have_expired_go(ledger: None, engine: AsyncEngine) -> None:
    """However long jobs are kept."""
    await lent(engine, timedelta(seconds=-1), 3)
    await lent(engine, timedelta(hours=1), 2)
    assert await pruning(engine).prune() == 3
    assert await keys_left(engine) == 2


@pytest.mark.parametrize("keep", [timedelta(days=36_500).total_seconds(), 1e15], ids=["a century", "for ever"])
async def test_who_keeps_jobs_for_ever_is_rid_of_expired_keys_all_the_same(
    ledger: None, engine: AsyncEngine, keep: float
) -> None:
    kept = {await aged(engine, timedelta(days=3_000), "done")}
    await lent(engine, timedelta(seconds=-1), 3)
    state = a_state(engine, keep=keep)
    state.leads_until = float("inf")
    assert await Pruner(state).prune() == 3
    assert await left(engine) == kept


async def test_keys_go_in_batches_by_their_index(
    ledger: None, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.worker.maintenance.pruner, "BATCH", 10)
    monkeypatch.setattr(coord.worker.maintenance.pruner, "BATCHES", 2)
    await lent(engine, timedelta(seconds=-1), 25)
    await lent(engine, timedelta(hours=1), 5_000)
    async with engine.begin() as connection:
        await connection.execute(text("ANALYZE coord_idempotency_keys"))
        sql = _expired().compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})
        plan = "\n".join(await connection.scalars(text(f"EXPLAIN {sql}")))
    assert "coord_idempotency_keys_expiry" in plan, plan
    assert "Seq Scan" not in plan, plan
    assert [await pruning(engine).prune() for _ in range(3)] == [20, 5, 0]


async def test_a_key_that_is_taken_anew_stays(ledger: None, engine: AsyncEngine) -> None:
    await lent(engine, timedelta(seconds=-1), 2)
    async with engine.begin() as connection:
        one = select(keys.c.key).limit(1).scalar_subquery()
        later = datetime.now(UTC) + timedelta(days=1)
        await connection.execute(update(keys).where(keys.c.key == one).values(expires_at=later))
        async with asyncio.timeout(5):
            assert await pruning(engine).prune() == 1
    assert await pruning(engine).prune() == 0
    assert await keys_left(engine) == 1


async def test_a_worker_prunes(office: Office, engine: AsyncEngine) -> None:
    await lent(engine, timedelta(seconds=-1))
    old, new = await aged(engine, timedelta(seconds=30), "done"), await aged(engine, timedelta(seconds=1), "done")
    async with working(office, [a_task], keep=20):

        async def pruned() -> bool:
            return old not in await left(engine) and await keys_left(engine) == 0

        await eventually(pruned)
        assert new in await left(engine)


async def cancelled(office: Office, job: Job) -> str:
    async with office.session_maker() as session:
        state = await cancel_job(session, job.id)
        await session.commit()
    return str(state)


async def wishes(office: Office) -> int:
    async with office.session_maker() as session:
        return await session.scalar(select(func.count()).select_from(cancellations)) or 0


async def test_wishes_to_cancel_what_has_ended_go_and_others_stay(office: Office, engine: AsyncEngine) -> None:
    queued = await office.enqueue(task_options(a_task, delay=60))
    ended = await aged(engine, timedelta(seconds=1), "done")
    async with office.session_maker.begin() as session:
        for job_id in (queued.id, ended, uuid4()):
            await session.execute(insert(cancellations).values(job_id=job_id))
    assert await pruning(engine).prune() == 2
    assert await wishes(office) == 1


async def test_what_is_known_of_a_jobs_attempts_goes_with_it(ledger: None, engine: AsyncEngine) -> None:
    old, new = await aged(engine, timedelta(days=8), "failed"), await aged(engine, timedelta(days=1), "failed")
    async with engine.begin() as connection:
        for job_id in (old, new):
            await connection.execute(insert(attempts).values(job_id=job_id, number=1, outcome="failed"))
    await pruning(engine).prune()
    async with engine.connect() as connection:
        assert list(await connection.scalars(select(attempts.c.job_id))) == [new]


async def test_a_cancelled_job_can_be_run_again(office: Office) -> None:
    ran: list[int] = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_try"])

    job = await office.enqueue(task_options(task, delay=60))
    await cancelled(office, job)
    async with working(office, [task]):
        async with office.session_maker() as session:
            await retry_job(session, job.id)
            await session.commit()
        row = await office.final(job)
    assert (row.state, row.attempt, ran) == ("done", 2, [2])
