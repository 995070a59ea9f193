"""How a worker stops: what runs gets its time, what does not end is another worker's, and no attempt is used up."""

# ruff: noqa: F401, F811 - fixtures are imported
from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from coord import job_transaction
from coord.dev.embedded import Valkey
from coord.worker.messages import serialize
from tests.ledger import ledger
from tests.serving import eventually
from tests.test_pickup import measured
from tests.workers import Notes, Office, client, notes, office, opened, process, until, working

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("tables")
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@SIGNALS
async def test_what_runs_finishes_within_the_grace(office: Office, notes: Notes, number: signal.Signals) -> None:
    async with process(office, notes, COORD_TEST_GRACE="20", COORD_TEST_MAX_JOBS="2") as worker:
        running = [await office.enqueue("hold", "go"), await office.enqueue("plain", "go")]
        for job in running:
            await notes.say(job, "starts")
        queued = await office.enqueue("quick")
        worker.signal(number)
        await worker.says(f"{number.name}: stops, leaving 2 running jobs 20 s")
        notes.let("go")
        assert await worker.exit_status(within=3) == 0
        rows = [await office.row(job) for job in running]
        assert [(row.state, row.attempt) for row in rows] == [("done", 1)] * 2
        assert notes.of(queued) == []
        assert (await office.row(queued)).state == "queued"
        assert await office.workers() == []
        assert await office.left_in_redis() == [f"arq:job:{queued.id}", "arq:queue"]
        assert worker.count("Traceback|rror") == 0, worker.lines


@pytest.mark.parametrize(
    "hurried", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["grace over", "second signal"]
)
async def test_what_does_not_finish_is_begun_elsewhere_at_once_as_the_same_attempt(
    office: Office, notes: Notes, hurried: bool
) -> None:
    async with process(office, notes, COORD_TEST_GRACE="60" if hurried else "0.3") as worker:
        jobs = [await office.enqueue(task, "go") for task in ("hold", "hold_lock", "hold_transaction", "plain")]
        for job, what in zip(jobs, ["starts", "locked", "entered", "starts"], strict=True):
            await notes.say(job, what)
        async with process(office, notes) as other:
            worker.signal(signal.SIGTERM)
            await worker.says("SIGTERM: stops")
            if hurried:
                worker.signal(signal.SIGTERM)
            told = time.monotonic()
            for job in jobs:
                _, pid, _ = await notes.say(job, "starts", times=2, within=2)
                assert pid == other.pid
            assert time.monotonic() - told < 2
            assert await worker.exit_status(within=3) == 0
            notes.let("go")
            rows = [await office.final(job) for job in jobs]
            assert [(row.state, row.attempt, row.error) for row in rows] == [("done", 1, None)] * 4
            assert [await office.effects(job) for job in jobs] == [[1], [1], [1], []]
            await office.nothing_left_in_redis()
            assert [row.pid for row in await office.workers()] == [other.pid]


@SIGNALS
async def test_a_worker_with_no_jobs_ends_within_a_second(office: Office, notes: Notes, number: signal.Signals) -> None:
    async with process(office, notes) as worker:
        await office.final(await office.enqueue("quick"))
        began = time.monotonic()
        worker.signal(number)
        assert await worker.exit_status() == 0
        assert time.monotonic() - began < 1
        assert await office.workers() == []
        assert worker.count("Traceback|rror") == 0, worker.lines


@pytest.mark.slow
async def test_a_worker_that_waits_for_its_jobs_burns_no_time(office: Office, notes: Notes) -> None:
    async with process(office, notes, COORD_TEST_GRACE="60") as worker:
        job = await office.enqueue("sleep", 5)
        await notes.say(job, "starts")
        await asyncio.sleep(1)  # until it has begun: no part of its keep
        worker.signal(signal.SIGTERM)
        await worker.says("SIGTERM: stops")
        commands, cpu = await measured(office, worker.pid)
        assert await worker.exit_status() == 0
        assert (await office.row(job)).state == "done"
    assert cpu < 0.03
    assert commands < 13


async def test_an_applied_effect_is_not_run_again_because_the_worker_stops(office: Office, notes: Notes) -> None:
    async with process(office, notes, COORD_TEST_GRACE="0.1") as worker:
        job = await office.enqueue("linger")
        await notes.say(job, "applied")
        worker.signal(signal.SIGTERM)
        assert await worker.exit_status(within=3) == 0
    assert (await office.row(job)).state == "done"
    assert await office.left_in_redis() == []


@pytest.mark.slow
async def test_a_worker_stops_while_redis_is_away(office: Office, notes: Notes, tmp_path: Path) -> None:
    """What it could not give back uses up no attempt either; what only arq knew is lost with Redis."""
    with Valkey(tmp_path / "valkey") as server:
        async with opened(office.database_url, server.url) as other:
            async with process(other, notes, COORD_TEST_GRACE="0.3") as worker:
                jobs = [await other.enqueue(task, "go") for task in ("hold", "plain")]
                async with contextlib.aclosing(client(server.url, job_serializer=serialize)) as stock:
                    await stock.enqueue_job("plain", "go")
                await until(lambda: len(notes.all()) == 3)
                await asyncio.to_thread(server.stop, "immediate")
                worker.signal(signal.SIGTERM)
                assert await worker.exit_status(within=8) == 0
                assert worker.count("Traceback") == 0, worker.lines
            await asyncio.to_thread(server.start)
            notes.let("go")
            async with process(other, notes):
                rows = [await other.final(job) for job in jobs]
    assert [(row.state, row.attempt) for row in rows] == [("done", 1)] * 2


async def test_a_worker_started_without_redis_waits_and_stops_when_told_to(office: Office, notes: Notes) -> None:
    nowhere = "redis://127.0.0.1:1/0"
    async with process(office, notes, started=False, COORD_REDIS_URL=nowhere) as worker:
        await worker.says("Redis is away, jobs wait")
        worker.signal(signal.SIGTERM)
        assert await worker.exit_status(within=5) == 0
        assert worker.count("Redis is away") == 1
        assert worker.count("Traceback") == 0, worker.lines
    assert await office.workers() == []


async def test_what_is_given_back_rings_the_bell(office: Office) -> None:
    """Nobody has to look for it."""
    begun = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with working(office, [task]) as worker, office.redis.pubsub() as heard:
        job = await office.enqueue(task)
        await begun.wait()
        await heard.subscribe("arq:queue:bell")
        assert (await heard.get_message(timeout=5))["type"] == "subscribe"
        await worker.stop()

        async def rung() -> bool:
            return (await heard.get_message(ignore_subscribe_messages=True)) is not None

        await eventually(rung)
    assert (await office.row(job)).attempt == 1


async def until_gone(office: Office) -> None:
    async def gone() -> bool:
        return not await office.workers() and not await office.redis.keys("arq:in-progress:*")

    await eventually(gone)


@pytest.mark.slow
async def test_closed_in_the_middle_of_its_work_a_worker_leaves_nothing(office: Office) -> None:
    """As applications do that run it in their own event loop: many times, since it matters where it is struck."""
    ran: list[str] = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])
        async with job_transaction(ctx):
            pass

    jobs = [await office.enqueue(task) for _ in range(200)]
    for round_ in range(1, 9):
        async with working(office, [task], max_jobs=7) as worker:
            await until(lambda round_=round_: len(ran) >= 15 * round_)  # type: ignore[misc]
            await worker.stop()
            await until_gone(office)
    async with working(office, [task]):
        rows = [await office.final(job) for job in jobs]
    assert {(row.state, row.attempt) for row in rows} == {("done", 1)}
