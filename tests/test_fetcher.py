"""How jobs get from Redis to a worker: at once, once, at little cost, and whatever becomes of Redis."""

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
from arq.worker import Retry
from sqlalchemy import text, update

import coord.worker.fetcher
from coord import cancel_job, job_transaction, task_options
from coord.dev.embedded import Valkey
from coord.jobs.model import queues
from coord.queue.message import Message
from coord.worker.fetcher import BACK_SECONDS
from tests.serving import eventually
from tests.shop import waiting_for_locks
from tests.workers import KEYS, Notes, Office, fresh, opened, process, working

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    import asyncpg

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
    assert max(commands for commands, _ in costs) < 40, costs
    assert max(cpu for _, cpu in costs) < 0.15, costs


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


async def test_what_a_worker_has_taken_is_told_although_no_slot_is_free_for_more(office: Office) -> None:
    goes_on = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        await goes_on.wait()

    async with working(office, [task], max_jobs=1):
        jobs = [await office.enqueue(task) for _ in range(2)]
        await eventually(lambda: office.redis.zcard(KEYS.taken), within=1)
        assert await office.redis.zcard(KEYS.feed) == 1
        goes_on.set()
        for job in jobs:
            await office.final(job)


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
        assert 0 <= started[str(job.id)] - job.scheduled_at.timestamp() < 3


async def test_a_job_of_the_far_future_disturbs_nobody(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    async with working(office, [task]):
        await office.enqueue(task_options(task, delay=250_000 * 365.0))
        await office.waiting(0)
        assert (await office.final(await office.enqueue(task))).state == "done"


@pytest.mark.slow
@pytest.mark.parametrize("skew", [-600.0, 600.0])
async def test_a_process_whose_clock_is_off_by_ten_minutes_delays_and_hurries_nothing(
    office: Office, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """The one that enqueues, and the worker: both are this one."""
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(skew * 1e9))
    ran: dict[str, float] = {}

    async def task(ctx: dict[str, Any]) -> None:
        ran[ctx["job_id"]] = time.monotonic()

    async with working(office, [task]):
        began = time.monotonic()
        at_once = await office.enqueue(task)
        later = await office.enqueue(task_options(task, delay=1.5))
        for job in (at_once, later):
            await office.final(job)
    assert ran[str(at_once.id)] - began < 1
    assert 1.5 <= ran[str(later.id)] - began < 3


async def test_a_worker_that_stops_gives_back_what_a_pop_still_brings(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    for _ in range(5):
        async with working(office, [task]) as worker:
            worker.task.cancel()
            jobs = [await office.enqueue(task) for _ in range(3)]
        rows = [await office.row(job) for job in jobs]
        queued = [row for row in rows if row.state == "queued"]
        assert await office.redis.zcard(KEYS.feed) == len(queued)
        async with working(office, [task]):
            rows = [await office.final(job, within=2) for job in jobs]
        assert {row.attempt for row in rows} == {1}


@pytest.mark.parametrize("priorities", [[0, 5, -5, 100, -100, 5], [1, 2, 3], [-1, 0, 1]])
async def test_of_what_waits_the_highest_priority_is_taken_first_and_then_the_eldest(
    office: Office, priorities: list[int]
) -> None:
    ran: list[str] = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])

    jobs = []
    for priority in priorities:
        jobs.append(await office.enqueue(task_options(task, priority=priority)))
        await office.waiting(len(jobs))
    async with working(office, [task], max_jobs=1):
        for job in jobs:
            await office.final(job)
    assert ran == [str(job.id) for job in sorted(jobs, key=lambda job: (-job.priority, job.scheduled_at))]


async def paused(office: Office, since: Any) -> None:
    async with office.session_maker.begin() as session:
        await session.execute(update(queues).values(paused_at=since))


@pytest.mark.slow
async def test_of_a_paused_queue_nothing_is_taken_until_it_goes_on(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    async with working(office, [task]) as worker:
        state = worker.worker.ctx["coord.lifecycle"].state
        await eventually(lambda: _leader(office))
        await paused(office, text("now()"))
        await eventually(lambda: state.is_paused, within=2)
        jobs = [await office.enqueue(task) for _ in range(5)]
        await office.waiting(5)
        await asyncio.sleep(1)  # in which somebody might take one
        assert {(await office.row(job)).state for job in jobs} == {"queued"}
        await office.waiting(5)
        await paused(office, None)
        for job in jobs:
            await office.final(job, within=3)


async def _leader(office: Office) -> Any:
    async with office.session_maker() as session:
        return (await session.execute(text("SELECT leader FROM coord_queues"))).scalar()


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
    await office.waiting(1)
    await office.redis.delete(KEYS.feed)
    await office.put(Message(**{**message(job), "args": [deed]}).text(), fresh())
    async with working(office, [task]) as worker:
        await eventually(lambda: ran and not len(worker.running))
        assert worker.lives
        assert await office.row(job) == before
        await office.nothing_left_in_redis()
    assert (applied, ran) == ([], [deed])


GARBAGE = [
    b"",
    b"\xff\xfe",
    b"{}",
    b"[]",
    b"null",
    b"{" * 100_000,
    b'{"id": 1}',
    b'{"id": "x", "attempt": 1, "task": "task", "arguments": [[], {}]}',
    b'{"id": "01a22890-2e16-7908-9134-dc9968b881d5", "attempt": 1e999, "task": "task", "arguments": [[], {}]}',
    b'{"id": "01a22890-2e16-7908-9134-dc9968b881d5", "attempt": 1, "task": "", "arguments": [[], {}]}',
    b'{"id": "01a22890-2e16-7908-9134-dc9968b881d5", "attempt": 1, "task": "task", "arguments": [[]]}',
    b'{"id": "01a22890-2e16-7908-9134-dc9968b881d5", "attempt": 1, "task": "t", "arguments": [[], {}], "trace": 5}',
    b"cos\nsystem\n(S'touch /tmp/never'\ntR.",
    b"x" * 2_000_000,
]


@pytest.mark.parametrize(
    "score", [fresh(), 0, float("inf"), float("-inf"), -5], ids=["fresh", "0", "inf", "-inf", "-5"]
)
async def test_what_is_no_message_is_dropped_with_one_line(
    office: Office, score: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    for garbage in GARBAGE:
        await office.put(garbage, score)
        await office.redis.zadd(KEYS.soon, {b"%03d" % (100) + garbage: 1, garbage: 2})
    async with working(office, [task]) as worker:
        job = await office.enqueue(task)
        assert (await office.final(job)).state == "done"
        await office.waiting(0)
        await office.final(await office.enqueue(task))
        assert worker.lives
    said = [record for record in caplog.records if "was dropped" in record.getMessage()]
    assert len(GARBAGE) <= len(said) <= 3 * len(GARBAGE)
    assert max(len(record.getMessage()) for record in said) < 500


@pytest.mark.slow
async def test_what_redis_has_lost_or_was_told_wrongly_is_handed_over_again_within_five_seconds(
    office: Office, script: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """A feed that was deleted, a message that was forged; a job popped by who died then, or never handed over."""
    applied = []

    async def task(ctx: dict[str, Any], argument: str) -> None:
        async with job_transaction(ctx):
            applied.append(argument)

    forged = await office.enqueue(task, "forged")
    wiped = await office.enqueue(task, "wiped")
    await office.waiting(2)
    await office.redis.delete(KEYS.feed)
    await office.put(Message(**{**message(forged), "args": ["by somebody"]}).text(), fresh())
    async with working(office, [task]):
        await office.waiting(0)
        popped = await script.enqueue(task, "popped")
        await office.lose(popped)
        forgotten = await script.enqueue(task, "forgotten")
        rows = [await office.final(job, within=5) for job in (forgotten, popped, wiped)]
        rows.append(await office.final(forged, within=10))  # somebody has taken it, and counts for a while
    assert {(row.state, row.attempt) for row in rows} == {("done", 1)}
    assert sorted(applied) == ["forged", "forgotten", "popped", "wiped"]
    assert sum("were not to be found in Redis" in record.getMessage() for record in caplog.records) >= 1


@pytest.mark.parametrize("held", [1.4, 2.5])
async def test_a_job_whose_check_took_too_long_is_not_begun_but_taken_anew(
    office: Office, observer: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, held: float
) -> None:
    """Soon it goes back into the feed; later another worker may run it by now, and it is left to the reconciler."""
    monkeypatch.setattr(coord.worker.fetcher, "CHECK_SECONDS", 10.0)
    began: list[float] = []

    async def task(ctx: dict[str, Any]) -> None:
        began.append(time.monotonic())

    async with working(office, [task]):
        await office.final(await office.enqueue(task))
        job = await office.enqueue(task_options(task, delay=3600))
        async with observer.transaction():
            await observer.execute("UPDATE coord_jobs SET scheduled_at = now() WHERE id = $1", job.id)
        async with observer.transaction():
            await observer.execute("LOCK TABLE coord_jobs IN ACCESS EXCLUSIVE MODE")
            await office.put(Message.of(job).text())
            await eventually(lambda: waiting_for_locks(observer, "SELECT coord_jobs.id, coord_jobs.attempt"))
            await asyncio.sleep(held)  # in which it gets too late
        released = time.monotonic()
        assert (await office.final(job, within=20)).attempt == 1
    assert len(began) == 2
    if held < BACK_SECONDS:
        assert began[1] - released < 0.5
    else:
        assert began[1] - released > 0.5, "it was begun from what was popped before"


@pytest.mark.parametrize("ending", ["cancelled", "delayed"])
async def test_a_job_that_is_cancelled_before_it_begins_leaves_redis(office: Office, ending: str) -> None:
    ran: list[str] = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])

    job = await office.enqueue(task_options(task, delay=30 if ending == "delayed" else None))
    await office.waiting(1)
    async with office.session_maker() as session:
        assert await cancel_job(session, job.id) == "cancelled"
        await session.commit()
    await office.waiting(0)
    async with working(office, [task]):
        await office.final(await office.enqueue(task))
    assert str(job.id) not in ran


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
        await eventually(unknown)
        await eventually(lambda: not len(worker.running))
        async with working(office, [new]):
            row = await office.final(job, within=20)
        assert (row.state, row.attempt) == ("done", 1)
        assert len(unknown()) == 1, "said once, and not each time it comes up"


async def test_what_a_worker_does_not_know_keeps_nothing_else_waiting(office: Office) -> None:
    async def known(ctx: dict[str, Any]) -> None: ...

    for _ in range(6):
        await office.enqueue("nobody_knows")
    job = await office.enqueue(known)
    async with working(office, [known], max_jobs=1):
        assert (await office.final(job, within=2)).state == "done"


async def test_what_nobody_knows_fails_only_if_that_is_asked_for(office: Office) -> None:
    """And by the time that workers have put it off for, not by the time that nobody was there."""

    async def old(ctx: dict[str, Any]) -> None:
        """What is there."""

    job = await office.enqueue("nobody_knows")
    async with working(office, [old], unknown_after=0.6):
        row = await office.final(job)
    assert (row.state, row.error) == ("failed", "LookupError: the task nobody_knows is not known here")
    assert row.unknown_seconds >= 0.6
    async with working(office, [old]):
        patient = await office.enqueue("nobody_knows")

        async def goes_back() -> bool:
            return bool((await office.row(patient)).unknown_seconds > 1)

        await eventually(goes_back, within=15)
        row = await office.row(patient)
    assert (row.state, row.attempt) == ("queued", 1)
    assert "is not known here" in row.error


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
        await eventually(lambda: said("Redis does not serve this worker"), within=6)
        meanwhile = await office.enqueue(quick)
        await over
        await eventually(lambda: said("Redis serves this worker"), within=6)
        go.set()
        assert (await office.final(running)).state == "done"
        rows = [await office.final(meanwhile), await office.final(await office.enqueue(quick))]
        assert [(row.state, row.attempt) for row in rows] == [("done", 1)] * 2
        assert worker.lives
        await office.nothing_left_in_redis()
    assert (said("Redis does not serve this worker"), said("Redis serves this worker")) == (1, 1)


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
        await office.waiting(2)
        await office.redis.replicaof("127.0.0.1", "1")
        go.set()
        await eventually(lambda: said("does not serve this worker, jobs wait: "))
        await office.redis.replicaof("NO", "ONE")
        for job in jobs:
            assert (await office.final(job)).state == "done"
        await office.nothing_left_in_redis()
        assert worker.lives
    assert (said("Redis does not serve this worker"), said("Redis serves this worker")) == (1, 1)


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
        await eventually(lambda: len(begun) == 2)
        await asyncio.to_thread(feed.server.stop, "immediate")
        go.set()
        assert [(await office.final(job)).state for job in jobs] == ["done", "failed"]
        assert worker.lives
        await asyncio.to_thread(feed.server.start)
        assert (await office.final(await office.enqueue(task, "applies"))).state == "done"
