"""How a worker stops: what runs gets its time, what does not end is another worker's, and no attempt is used up."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import job_transaction, task_options, worker_settings
from coord.dev.embedded import Valkey
from coord.worker.lifecycle import Lifecycle
from tests.proxy import Proxy
from tests.serving import eventually
from tests.test_fetcher import measured
from tests.workers import KEYS, Notes, Office, opened, process, working

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
        await worker.says("This worker stops, leaving 2 running jobs 20 s")
        notes.let("go")
        assert await worker.exit_status(within=10) == 0
        rows = [await office.row(job) for job in running]
        assert [(row.state, row.attempt) for row in rows] == [("done", 1)] * 2
        assert notes.of(queued) == []
        assert (await office.row(queued)).state == "queued"
        assert await office.workers() == []
        assert await office.left_in_redis() == [KEYS.feed]
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
        async with process(office, notes, heartbeat_process=False) as other:
            worker.signal(signal.SIGTERM)
            await worker.says("This worker stops")
            if hurried:
                worker.signal(signal.SIGTERM)
            told = time.monotonic()
            for job in jobs:
                _, pid, _ = await notes.say(job, "starts", times=2, within=2)
                assert pid == other.pid
            assert time.monotonic() - told < 2
            assert await worker.exit_status(within=10) == 0
            notes.let("go")
            rows = [await office.final(job) for job in jobs]
            assert [(row.state, row.attempt, row.error) for row in rows] == [("done", 1, None)] * 4
            assert [row.hand_backs for row in rows] == [1] * 4
            assert [await office.effects(job) for job in jobs] == [[1], [1], [1], []]
            await office.nothing_left_in_redis()
            assert [row.pid for row in await office.workers()] == [other.pid]


@SIGNALS
async def test_a_worker_with_no_jobs_ends_at_once(office: Office, notes: Notes, number: signal.Signals) -> None:
    async with process(office, notes, COORD_TEST_GRACE="60") as worker:
        await office.final(await office.enqueue("quick"))
        began = time.monotonic()
        worker.signal(number)
        assert await worker.exit_status() == 0
        assert time.monotonic() - began < 10, "it has waited for nobody"
        assert await office.workers() == []
        assert worker.count("Traceback|rror") == 0, worker.lines


@pytest.mark.slow
async def test_a_worker_that_waits_for_its_jobs_burns_no_time(office: Office, notes: Notes) -> None:
    async with process(office, notes, COORD_TEST_GRACE="60") as worker:
        job = await office.enqueue("sleep", 5)
        await notes.say(job, "starts")
        await asyncio.sleep(1)  # until it has begun: no part of its keep
        worker.signal(signal.SIGTERM)
        await worker.says("This worker stops")
        commands, cpu = await measured(office, worker.pid)
        assert await worker.exit_status() == 0
        assert (await office.row(job)).state == "done"
    assert cpu < 0.15
    assert commands < 60


async def test_an_applied_effect_is_not_run_again_because_the_worker_stops(office: Office, notes: Notes) -> None:
    async with process(office, notes, COORD_TEST_GRACE="0.1") as worker:
        job = await office.enqueue("linger")
        await notes.say(job, "applied")
        worker.signal(signal.SIGTERM)
        assert await worker.exit_status(within=10) == 0
    assert (await office.row(job)).state == "done"
    assert await office.left_in_redis() == []


@pytest.mark.slow
async def test_a_worker_stops_while_redis_is_away(office: Office, notes: Notes, tmp_path: Path) -> None:
    """What it could not give back uses up no attempt either."""
    with Valkey(tmp_path / "valkey") as server:
        async with opened(office.database_url, server.url) as other:
            async with process(other, notes, COORD_TEST_GRACE="0.3") as worker:
                jobs = [await other.enqueue(task, "go") for task in ("hold", "plain")]
                await eventually(lambda: len(notes.all()) == 2)
                await asyncio.to_thread(server.stop, "immediate")
                worker.signal(signal.SIGTERM)
                assert await worker.exit_status(within=8) == 0
                assert worker.count("Traceback") == 0, worker.lines
            await asyncio.to_thread(server.start)
            notes.let("go")
            async with process(other, notes, heartbeat_process=False):
                rows = [await other.final(job) for job in jobs]
    assert [(row.state, row.attempt) for row in rows] == [("done", 1)] * 2


@pytest.mark.slow
async def test_a_worker_stops_although_postgresql_says_nothing(office: Office, notes: Notes) -> None:
    """Neither to what its loops ask nor to the end of a connection, which its application's `on_shutdown` waits for.

    Half a minute is what Kubernetes leaves a container by itself.
    """
    async with Proxy(office.database_url).opened() as way:
        async with opened(way.url, office.redis_url, coordinated=False) as other:
            async with process(other, notes, COORD_TEST_GRACE="0.1", heartbeat_process=False) as worker:
                await office.final(await office.enqueue("quick"))
                way.flows.clear()
                worker.signal(signal.SIGTERM)
                assert await worker.exit_status(within=30) == 0


async def test_a_worker_started_without_redis_waits_and_stops_when_told_to(office: Office, notes: Notes) -> None:
    nowhere = "redis://127.0.0.1:1/0"
    async with process(office, notes, started=False, COORD_REDIS_URL=nowhere) as worker:
        await worker.says("Redis does not serve arq")
        worker.signal(signal.SIGTERM)
        assert await worker.exit_status(within=5) == 0
        assert worker.count("Redis does not serve") == 1
        assert worker.count("Traceback") == 0, worker.lines
    assert await office.workers() == []


@pytest.mark.parametrize("key", [None, "one"])
@pytest.mark.parametrize("stubborn", ["swallows", "waits on"])
async def test_a_task_that_ignores_its_cancellation_does_not_keep_the_worker(
    office: Office, stubborn: str, key: str | None
) -> None:
    """It has the grace, and then some; its job is another worker's. When it ends at last it opens no connection."""
    begun = asyncio.Event()
    release = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                if stubborn == "waits on":
                    await asyncio.sleep(0.01)

    async with working(office, [task], grace=0.1) as worker:
        job = await office.enqueue(task_options(task, one_at_a_time=key))
        await begun.wait()
        began = time.monotonic()
        await worker.stop()
        assert time.monotonic() - began < 12
        release.set()
    assert (await office.row(job)).state in ("queued", "done")
    gc.collect()  # a connection that nobody has closed is an error of this test's, and of no later one's


@pytest.mark.slow
async def test_the_signal_of_a_forked_child_is_the_childs_alone(office: Office, notes: Notes) -> None:
    async with process(office, notes) as worker:
        jobs = [await office.enqueue("fork") for _ in range(2)]
        for job in jobs:
            assert (await office.final(job, within=20)).attempt == 1
            await notes.say(job, f"child ended with -{signal.SIGTERM:d}")
        assert (await office.final(await office.enqueue("quick"))).state == "done"
        assert worker.count("stops|shutdown") == 0


async def test_a_job_that_makes_its_workers_stop_comes_to_an_end(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coord.worker.finalizer.MAX_HAND_BACKS", 2)
    begun: list[str] = []

    async def task(ctx: dict[str, Any]) -> None:
        begun.append(ctx["job_id"])
        await asyncio.Event().wait()

    job = await office.enqueue(task)
    for number in range(1, 4):
        async with working(office, [task], grace=0.05):
            await eventually(lambda number=number: len(begun) == number)
    row = await office.row(job)
    assert (row.state, row.attempt, row.hand_backs) == ("failed", 1, 2)
    assert "was told to stop" in row.error


@pytest.mark.slow
async def test_a_worker_that_is_told_to_stop_while_it_starts_leaves_nothing(office: Office, notes: Notes) -> None:
    for moment in ("Starting worker", "redis_version"):
        async with process(office, notes, started=False) as worker:
            await worker.says(moment)
            worker.signal(signal.SIGTERM)
            assert await worker.exit_status(within=10) == 0
            assert worker.count("Traceback") == 0, worker.lines
        assert await office.workers() == []


async def until_gone(office: Office) -> None:
    async def gone() -> bool:
        return not await office.workers()

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
        async with working(office, [task], max_jobs=7, heartbeat_process=round_ % 4 == 0) as worker:
            await eventually(lambda round_=round_: len(ran) >= 15 * round_)
            await worker.stop()
            await until_gone(office)
    async with working(office, [task]):
        rows = [await office.final(job) for job in jobs]
    assert {(row.state, row.attempt) for row in rows} == {("done", 1)}


@pytest.mark.parametrize("mode", ["of the engine", "of its options"])
async def test_an_engine_in_autocommit_mode_is_refused_at_the_start(
    office: Office, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A job would be done before its effect, and stay so without it."""
    autocommit = {"isolation_level": "AUTOCOMMIT"}
    engine = create_async_engine(office.database_url, **(autocommit if mode == "of the engine" else {}))
    bind = engine if mode == "of the engine" else engine.execution_options(**autocommit)
    settings: Any = worker_settings([], session_maker=async_sessionmaker(bind), redis=office.redis_url)
    with pytest.raises(SystemExit):
        await Lifecycle(settings.worker_config(), {}).start()
    await engine.dispose()
    assert "AUTOCOMMIT" in caplog.text
    assert await office.workers() == []
