"""How jobs get from Redis to a worker: at once, once, at little cost, and whatever becomes of Redis."""

# ruff: noqa: F401, F811 - fixtures are imported
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arq.worker
import pytest
from arq.constants import default_queue_name
from arq.worker import Retry

import coord.worker.pickup
from coord import job_transaction, task_options
from coord.dev.embedded import Valkey
from coord.jobs.feed import Message
from coord.notify.outage import Outage
from coord.worker.address import Address
from coord.worker.link import Link
from tests.ledger import ledger
from tests.workers import Notes, Office, Working, client, notes, office, opened, process, script, until, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from arq.connections import ArqRedis

    from coord import Job


async def test_a_job_starts_within_milliseconds_of_its_commit(office: Office) -> None:
    started: dict[str, float] = {}

    async def task(ctx: dict[str, Any]) -> None:
        started[ctx["job_id"]] = time.perf_counter()

    async with working(office, [task]):
        await office.final(await office.enqueue(task))
        delays = []
        for _ in range(50):
            job = await office.enqueue(task)
            committed = time.perf_counter()
            await office.final(job)
            delays.append(started[str(job.id)] - committed)
    assert statistics.median(delays) < 0.02, sorted(delays)


async def measured(office: Office, pid: int, seconds: float = 3.0) -> tuple[float, float]:
    """Commands a second that Redis executes, and the share of a core that the process takes."""

    async def commands() -> int:
        found = await office.redis.info("commandstats")
        return sum(
            stats["calls"] for name, stats in found.items() if name not in ("cmdstat_info", "cmdstat_client|setinfo")
        )

    def cpu() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before, used = await commands(), cpu()
    await asyncio.sleep(seconds)  # the time is what is measured
    return (await commands() - before) / seconds, (cpu() - used) / seconds


@pytest.mark.slow
async def test_a_worker_that_is_idle_or_has_all_slots_busy_costs_next_to_nothing(office: Office, notes: Notes) -> None:
    async with process(office, notes, COORD_TEST_MAX_JOBS="2") as worker:
        await office.final(await office.enqueue("quick"))
        await asyncio.sleep(1)  # until it has begun: no part of its keep
        costs = [await measured(office, worker.pid)]
        jobs = [await office.enqueue("sleep", 60) for _ in range(10)]
        for job in jobs[:2]:
            await notes.say(job, "starts")
        await asyncio.sleep(0.5)
        costs.append(await measured(office, worker.pid))
        worker.signal(signal.SIGKILL)
    assert max(commands for commands, _ in costs) < 13, costs
    assert max(cpu for _, cpu in costs) < 0.02, costs


async def test_jobs_that_come_while_all_slots_are_busy_wake_nobody_and_wait_no_longer_for_that(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes, rings, begun = 0, 0, dict[str, float]()
    go_on = asyncio.Event()
    stirred, rung = coord.worker.pickup.Pickup._stirred, coord.worker.pickup.Pickup.rung

    async def counted(pickup: coord.worker.pickup.Pickup, until: float) -> None:
        nonlocal wakes
        await stirred(pickup, until)
        wakes += 1

    def heard(pickup: coord.worker.pickup.Pickup) -> None:
        nonlocal rings
        rings += 1
        rung(pickup)

    async def task(ctx: dict[str, Any]) -> None:
        begun[ctx["job_id"]] = time.perf_counter()
        await go_on.wait()

    monkeypatch.setattr(coord.worker.pickup, "POLL", 30.0)
    monkeypatch.setattr(coord.worker.pickup.Pickup, "_stirred", counted)
    monkeypatch.setattr(coord.worker.pickup.Pickup, "rung", heard)
    async with working(office, [task], max_jobs=2):
        jobs = [await office.enqueue(task) for _ in range(2)]
        await until(lambda: len(begun) == 2)
        woken, heard_before = wakes, rings
        jobs += [await office.enqueue(task) for _ in range(20)]
        await until(lambda: rings > heard_before)
        await office.queued(22)
        assert wakes == woken
        ended = time.perf_counter()
        go_on.set()
        for job in jobs:
            await office.final(job)
    assert max(begun.values()) - ended < 3


async def test_no_more_jobs_run_than_a_worker_has_slots(office: Office) -> None:
    running, most = 0, 0

    async def task(ctx: dict[str, Any]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    jobs = [await office.enqueue(task) for _ in range(30)]
    async with working(office, [task], max_jobs=3):
        for job in jobs:
            await office.final(job)
    assert most == 3


async def test_workers_that_share_a_queue_run_every_job_once(office: Office) -> None:
    ran: list[tuple[str, str]] = []
    all_of_them = asyncio.Event()

    def tasks(worker: str) -> list[Any]:
        async def task(ctx: dict[str, Any]) -> None:
            ran.append((ctx["job_id"], worker))
            if {worker for _, worker in ran} == {"a", "b", "c"}:
                all_of_them.set()
            await all_of_them.wait()

        return [arq.worker.func(task, name="task")]

    async with contextlib.AsyncExitStack() as stack:
        for name in "abc":
            await stack.enter_async_context(working(office, tasks(name), max_jobs=2))
        jobs = [await office.enqueue("task") for _ in range(100)]
        for job in jobs:
            await office.final(job)
        await office.nothing_left_in_redis()
    assert sorted(id_ for id_, _ in ran) == sorted(str(job.id) for job in jobs)


async def test_a_delayed_job_starts_when_it_is_due_and_not_before(office: Office) -> None:
    started: dict[str, float] = {}

    async def task(ctx: dict[str, Any]) -> None:
        started[ctx["job_id"]] = time.time()

    async with working(office, [task]):
        jobs = [await office.enqueue(task_options(task, delay=delay)) for delay in (0.6, 0.2, 0.4)]
        for job in jobs:
            await office.final(job)
    for job in jobs:
        assert 0 <= started[str(job.id)] - job.due_at.timestamp() < 0.15


async def test_a_job_of_the_far_future_disturbs_nobody(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    async with working(office, [task]):
        await office.enqueue(task_options(task, delay=250_000 * 365.0))
        await office.queued(1)
        assert (await office.final(await office.enqueue(task))).state == "done"


async def test_a_worker_whose_clock_is_behind_that_of_redis_runs_what_is_due(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arq compares a delayed job's time with its own clock, and leaves lying what is not due by it."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 0.2)
    monkeypatch.setattr("arq.worker.timestamp_ms", lambda: int(time.time() * 1000))
    ran = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        ran.set()

    async with working(office, [task]):
        await office.enqueue(task_options(task, delay=0.1))
        await asyncio.wait_for(ran.wait(), 3)


async def claimed_unheard(office: Office, script: Office, task: Any, worker: Working, *args: Any) -> Job:
    """A job that the worker has claimed without being told: the connection broke before the answer came."""
    assert worker.redis.pickup is not None
    job = await script.enqueue(task, *args)
    await office.take(job, worker.redis.pickup.worker)
    return job


async def test_a_worker_that_stops_gives_back_what_it_does_not_know_it_has(office: Office, script: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    async with working(office, [task]) as worker:
        job = await claimed_unheard(office, script, task, worker)
        await worker.stop()
        assert await office.redis.exists(f"arq:in-progress:{job.id}") == 0
    async with working(office, [task]):
        row = await office.final(job, within=2)
    assert row.attempt == 1


def message(job: Job) -> dict[str, Any]:
    found = Message.of(job)
    return {name: getattr(found, name) for name in Message.__dataclass_fields__}


@pytest.mark.parametrize("deed", ["applies", "fails", "retries", "returns", "cannot connect"])
async def test_a_forged_message_does_nothing_to_the_ledgers_job(office: Office, deed: str) -> None:
    applied, ran = [], []

    async def task(ctx: dict[str, Any], argument: str) -> None:
        ran.append(argument)
        match argument:
            case "applies":
                async with job_transaction(ctx):
                    applied.append(argument)
            case "fails":
                raise ValueError(argument)
            case "retries":
                raise Retry(defer=0)
            case "cannot connect":
                raise ConnectionError(argument)

    job = await office.enqueue(task, "honest")
    before = await office.row(job)
    await office.queued(1)
    await office.redis.set(f"arq:job:{job.id}", Message(**{**message(job), "args": [deed]}).text())
    async with working(office, [task]) as worker:
        await until(lambda: ran and not worker.claimed)
        assert worker.lives
        assert await office.row(job) == before
        await office.nothing_left_in_redis()
    assert (applied, ran) == ([], [deed])


async def test_a_forged_trace_does_not_fail_the_job(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    job = await office.enqueue(task)
    await office.queued(1)
    text = Message(**{**message(job), "trace": {"traceparent": 5, "baggage": 7}}).text()
    await office.redis.set(f"arq:job:{job.id}", text)
    async with working(office, [task]):
        assert (await office.final(job)).state == "done"


@pytest.mark.slow
async def test_a_claim_lasts_as_long_as_its_job(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease is a minute, shortened here, and renewed while the worker lives; of jobs without a ledger too."""
    monkeypatch.setattr("coord.worker.pickup.LEASE", 1.5)
    monkeypatch.setattr("coord.worker.keeper.LEASE", 1.5)
    ran: list[str] = []
    go = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])
        await go.wait()

    tasks = [arq.worker.func(task, name="task")]
    async with working(office, tasks, max_jobs=2) as worker:
        job = await office.enqueue("task")
        plain = await client_of(worker).enqueue_job("task")
        assert plain is not None
        await until(lambda: len(ran) == 2)
        async with working(office, tasks):
            await asyncio.sleep(3)  # two leases
            go.set()
            assert (await office.final(job)).state == "done"
            await office.nothing_left_in_redis()
    assert sorted(ran) == sorted([str(job.id), plain.job_id])


def client_of(worker: Working) -> ArqRedis:
    return worker.redis


@pytest.mark.slow
async def test_what_redis_has_lost_or_was_told_wrongly_is_handed_over_again_within_five_seconds(
    office: Office, script: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that is garbled, or forged; a job claimed as the connection broke, or never handed over."""
    applied = []

    async def task(ctx: dict[str, Any], argument: str) -> None:
        async with job_transaction(ctx):
            applied.append(argument)

    garbled = await office.enqueue(task, "garbled")
    await office.queued(1)
    await office.redis.set(f"arq:job:{garbled.id}", b'{"f": "task", "a": [')
    other = await office.enqueue(task, "forged")
    await office.queued(2)
    await office.redis.set(f"arq:job:{other.id}", Message(**{**message(other), "args": ["by somebody"]}).text())
    async with working(office, [task]) as worker:
        await office.queued(0)
        assert not applied
        unheard = await claimed_unheard(office, script, task, worker, "unheard")
        forgotten = await script.enqueue(task, "forgotten")
        rows = [await office.final(job, within=5) for job in (unheard, forgotten, garbled, other)]
    assert {(row.state, row.attempt) for row in rows} == {("done", 1)}
    assert sorted(applied) == ["forged", "forgotten", "garbled", "unheard"]
    assert len([record for record in caplog.records if "is garbled" in record.getMessage()]) == 1


async def test_a_command_that_is_cancelled_is_cancelled_whenever_that_comes(redis_url: str) -> None:
    """Or the worker might not stop: `asyncio.wait_for`, by which redis-py sends, may swallow it before Python 3.12."""
    pool = Address(redis_url).pool()
    link = Link(pool, Outage(logging.getLogger("test"), away="away", back="back"))
    await link.execute_command("PING")
    for steps in range(20):
        task = asyncio.create_task(link.execute_command("PING"))
        for _ in range(steps):
            await asyncio.sleep(0)
        is_cancelled = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or not is_cancelled
    await link.close()


async def test_an_unknown_task_goes_back_until_a_worker_knows_it(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    async def old(ctx: dict[str, Any]) -> None:
        """What was there before the deployment."""

    async def new(ctx: dict[str, Any]) -> None:
        """What it brings."""

    def unknown() -> list[str]:
        return [record.getMessage() for record in caplog.records if "is not known here" in record.getMessage()]

    async with working(office, [old]) as worker:
        job = await office.enqueue(new)
        await until(unknown)
        assert not worker.claimed
        async with working(office, [new]):
            row = await office.final(job)
        assert (row.state, row.attempt) == ("done", 1)
        assert len(unknown()) == 1, "said once, and not each time it comes up"


async def test_what_a_worker_does_not_know_keeps_nothing_else_waiting(office: Office) -> None:
    async def known(ctx: dict[str, Any]) -> None: ...

    for _ in range(6):
        await office.enqueue("nobody_knows")
    job = await office.enqueue(known)
    async with working(office, [known], max_jobs=1):
        assert (await office.final(job, within=2)).state == "done"


async def test_what_nobody_knows_for_too_long_fails(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    async def old(ctx: dict[str, Any]) -> None:
        """What is there."""

    monkeypatch.setattr(coord.worker.pickup, "UNKNOWN_LIMIT", 0.6)
    async with working(office, [old]) as worker:
        job = await office.enqueue("nobody_knows")
        row = await office.final(job)
        assert (row.state, row.error) == ("failed", "LookupError: no worker knows the task nobody_knows")
        await until(lambda: not worker.claimed)
        await office.nothing_left_in_redis()
    assert (row.finished_at - row.created_at).total_seconds() >= 0.6


class Feed:
    """A Redis that tests may harm, and the jobs that run meanwhile."""

    def __init__(self, server: Valkey) -> None:
        self.server = server

    async def restarted(self) -> None:
        await asyncio.to_thread(self.server.restart, "immediate")

    async def away(self) -> None:
        await asyncio.to_thread(self.server.stop, "immediate")
        await asyncio.sleep(2)  # a minute, shortened
        await asyncio.to_thread(self.server.start)

    async def frozen(self) -> None:
        os.kill(self.server.pid, signal.SIGSTOP)
        await asyncio.sleep(3)
        os.kill(self.server.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Feed]:
    with Valkey(tmp_path_factory.mktemp("feed")) as server:
        yield Feed(server)


def sayings(caplog: pytest.LogCaptureFixture) -> Callable[[str], int]:
    """How often a worker has said something."""

    def said(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records if record.name == "arq.coord")

    return said


@pytest.mark.slow
@pytest.mark.parametrize("outage", [Feed.restarted, Feed.away, Feed.frozen])
async def test_no_outage_of_redis_ends_a_worker(
    ledger: None,
    database_url: str,
    feed: Feed,
    outage: Callable[[Feed], Coroutine[Any, Any, None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What runs finishes, what waits is run afterwards, and that Redis was away is said once."""
    go, begun = asyncio.Event(), asyncio.Event()

    async def held(ctx: dict[str, Any]) -> None:
        begun.set()
        await go.wait()
        async with job_transaction(ctx):
            pass

    async def quick(ctx: dict[str, Any]) -> None:
        """Nothing."""

    said = sayings(caplog)
    caplog.set_level(logging.INFO)
    async with opened(database_url, feed.server.url) as office, working(office, [held, quick]) as worker:
        running = await office.enqueue(held)
        await begun.wait()
        over = asyncio.create_task(outage(feed))
        await until(lambda: said("Redis is away, jobs wait"), within=6)
        meanwhile = await office.enqueue(quick)
        await over
        await until(lambda: said("Redis is back"), within=6)
        go.set()
        assert (await office.final(running)).state == "done"
        rows = [await office.final(meanwhile), await office.final(await office.enqueue(quick))]
        assert [(row.state, row.attempt) for row in rows] == [("done", 1)] * 2
        assert worker.lives
        await office.nothing_left_in_redis()
    assert (said("Redis is away"), said("Redis is back")) == (1, 1)


async def test_a_worker_gets_over_a_failover(
    ledger: None, database_url: str, feed: Feed, caplog: pytest.LogCaptureFixture
) -> None:
    """The old master takes no writes any more, until its name leads to the new one."""
    go, begun = asyncio.Event(), asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        await go.wait()

    said = sayings(caplog)
    async with opened(database_url, feed.server.url) as office, working(office, [task], max_jobs=1) as worker:
        jobs = [await office.enqueue(task) for _ in range(3)]
        await begun.wait()
        await office.queued(3)
        await office.redis.replicaof("127.0.0.1", "1")
        go.set()
        await until(lambda: said("Redis is away, jobs wait: READONLY") or said("Redis is away"))
        await office.redis.replicaof("NO", "ONE")
        for job in jobs:
            assert (await office.final(job)).state == "done"
        await office.nothing_left_in_redis()
        assert worker.lives
    assert (said("Redis is away"), said("Redis is back")) == (1, 1)


@pytest.mark.slow
async def test_jobs_end_while_redis_is_away(ledger: None, database_url: str, feed: Feed) -> None:
    """PostgreSQL is what says that they have."""
    go = asyncio.Event()
    begun: set[str] = set()

    async def task(ctx: dict[str, Any], deed: str) -> None:
        begun.add(ctx["job_id"])
        await go.wait()
        if deed == "fails":
            raise ValueError(deed)
        async with job_transaction(ctx):
            pass

    async with opened(database_url, feed.server.url) as office, working(office, [task]) as worker:
        jobs = [await office.enqueue(task, deed) for deed in ("applies", "fails")]
        await until(lambda: len(begun) == 2)
        await asyncio.to_thread(feed.server.stop, "immediate")
        go.set()
        assert [(await office.final(job)).state for job in jobs] == ["done", "failed"]
        assert worker.lives
        await asyncio.to_thread(feed.server.start)
        assert (await office.final(await office.enqueue(task, "applies"))).state == "done"
