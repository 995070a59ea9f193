"""What becomes of a worker's jobs and locks when it is killed, frozen, cut off, or merely slow."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from arq.worker import func
from sqlalchemy import insert, select

from coord import cancel_job, job_transaction, lock_tables, task_options
from coord.jobs.model import attempts, workers
from coord.worker.maintenance.registry import DEAD_SECONDS
from tests.ledger import a_task
from tests.models import User
from tests.serving import eventually
from tests.shop import Network
from tests.workers import KEYS, Notes, Office, Process, fragile_postgresql, opened, prepared, process, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    from coord import Job

pytestmark = [pytest.mark.usefixtures("tables"), pytest.mark.slow]

PROMISED = 10.0
"""Seconds in which the jobs of a worker that is gone run elsewhere and its locks are free."""
FAULTS = pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])


class Fault:
    """When it happened, and what has to be so soon afterwards."""

    def __init__(self, worker: Process, number: signal.Signals) -> None:
        worker.signal(number)
        self.at = time.monotonic()
        self.clock = datetime.now(UTC)

    async def over(self, office: Office, *jobs: Job) -> None:
        """One of them after the other: a worker takes one at a time of the jobs that may have killed one."""
        began = []
        for job in jobs:
            row = await office.final(job, within=max(self.at + PROMISED + 2 * len(jobs) - time.monotonic(), 0.01))
            assert row.state == "done"
            began.append(row.started_at)
        assert min(began) < self.clock + timedelta(seconds=PROMISED)
        async with office.session_maker.begin() as session, lock_tables(session, [User], timeout=0):
            """Its locks are free."""

    @property
    def age(self) -> float:
        return time.monotonic() - self.at


async def predicaments(office: Office, script: Office, notes: Notes, worker: Process) -> dict[str, Job]:
    """A job of the worker's in each place where its end is worst."""
    jobs = {
        "outside": await office.enqueue("hold", "go"),
        "locking": await office.enqueue("hold_lock", "go"),
        "in it": await office.enqueue("hold_transaction", "go"),
        "waiting": await office.enqueue("want_lock"),
        "failing": await office.enqueue("fail", "fail now"),
        "unwanted": await office.enqueue("hold_transaction", "never"),
        "unheard": await script.enqueue("quick"),
    }
    for name, what in [("outside", "starts"), ("locking", "locked"), ("in it", "entered"), ("unwanted", "entered")]:
        await notes.say(jobs[name], what)
    await office.lose(jobs["unheard"])
    return jobs


@contextlib.asynccontextmanager
async def held_up(observer: asyncpg.Connection, notes: Notes, jobs: dict[str, Job]) -> AsyncIterator[None]:
    """While somebody has what the worker waits for: a table, the row of a job that has failed, its own heartbeat's row.

    It waits at the end of the block, and is given all that when it can no longer make use of it.
    """
    async with observer.transaction():
        await observer.execute("SELECT FROM coord_jobs WHERE id = $1 FOR UPDATE", jobs["failing"].id)
        await observer.execute("SELECT FROM coord_workers FOR UPDATE")
        notes.let("fail now")

        async def all_wait() -> bool:
            statements = ("SELECT %coord_lock(%", "SELECT coord_jobs%", "%INSERT INTO coord_workers%")
            return min([await waiting(observer, statement) for statement in statements]) == 1

        await eventually(all_wait)
        yield


async def waiting(observer: asyncpg.Connection, like: str) -> int:
    """How many such statements wait for a lock."""
    await observer.execute("SELECT pg_stat_clear_snapshot()")  # which its transaction keeps
    query = """SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE $1"""
    return int(await observer.fetchval(query, like))


@FAULTS
async def test_a_worker_gone_at_the_worst_moment_leaves_nothing_that_lasts(
    office: Office, script: Office, notes: Notes, observer: asyncpg.Connection, fault: signal.Signals
) -> None:
    """Outside a job's transaction and in it, holding a table's lock and waiting for one, while it writes that a job has
    failed and while its heart beats: everything is done by another worker, and no lock is left. That does not hang on
    PostgreSQL's ending what is idle.
    """
    async with process(office, notes, COORD_TEST_MAX_JOBS="20", COORD_TEST_IDLE_LIMIT="60") as worker:
        async with observer.transaction():
            await observer.execute("LOCK TABLE items IN SHARE ROW EXCLUSIVE MODE")
            jobs = await predicaments(office, script, notes, worker)
            async with held_up(observer, notes, jobs):
                struck = Fault(worker, fault)
        async with process(office, notes, heartbeat_process=False) as other:
            notes.let("go")
            unwanted = jobs.pop("unwanted")
            assert await cancelled(office, unwanted) == ("cancelled" if fault is signal.SIGKILL else "running")
            failing = jobs.pop("failing")
            await struck.over(office, *jobs.values())
            assert (await how(office, jobs.pop("unheard")))[0] == "done"  # it was nobody's, and no death counts
            assert {await how(office, job) for job in jobs.values()} == {("done", 2, (2,))}
            assert all(pid == other.pid for job in jobs.values() for attempt, pid, _ in notes.of(job) if attempt == 2)
            assert (await office.final(failing)).error == "ValueError: fail now"
            assert (await office.final(unwanted)).state == "cancelled"
            assert len(notes.of(unwanted, "starts")) == 1
            if fault is signal.SIGSTOP:
                worker.signal(signal.SIGCONT)
                await worker.says("This worker was taken for dead")
                await eventually(lambda: worker.count("superseded") >= 1)
                await other.stop()
                later = await office.enqueue("quick")
                _, pid, _ = await notes.say(later, "starts")
                assert pid == worker.pid
                await office.nothing_left_in_redis()


async def test_a_dead_worker_that_cannot_be_rescued_keeps_no_other_one_from_it(
    office: Office, observer: asyncpg.Connection
) -> None:
    """Somebody has locked its row for as long as they like."""
    stuck, other = [
        await observer.fetchval(
            """INSERT INTO coord_workers (id, queue, host, pid, jobs, dead)
                VALUES (gen_random_uuid(), 'default', 'h', 1, '{}', true) RETURNING id"""
        )
        for _ in range(2)
    ]
    async with observer.transaction():
        await observer.execute("SELECT FROM coord_workers WHERE id = $1 FOR UPDATE", stuck)
        async with working(office, [a_task]):

            async def left() -> bool:
                return other not in {row.id for row in await office.workers()}

            await eventually(left, within=PROMISED)
            assert stuck in {row.id for row in await office.workers()}


async def how(office: Office, job: Job) -> tuple[str, int, tuple[int, ...]]:
    row = await office.row(job)
    return str(row.state), row.attempt, tuple(await office.effects(job))


async def cancelled(office: Office, job: Job) -> str:
    async with office.session_maker() as session:
        state = await cancel_job(session, job.id)
        await session.commit()
    return str(state)


async def test_a_worker_whose_pool_has_one_connection_rescues_too(office: Office, notes: Notes) -> None:
    """And runs what it has rescued: maintenance has connections of its own, one at a time."""

    async def hold_lock(ctx: dict[str, Any], name: str) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [User], timeout=0):
            """The dead one's lock is free."""

    small = {"pool_size": 1, "max_overflow": 0}
    async with process(office, notes) as worker:
        jobs = [await office.enqueue("hold_lock", "never")]
        await notes.say(jobs[0], "locked")
        jobs += [await office.enqueue("hold_transaction", "never") for _ in range(3)]
        for job in jobs[1:]:
            await notes.say(job, "entered")
        functions = [func(hold_lock, name="hold_lock"), func(hold_lock, name="hold_transaction")]
        async with working(office, functions, engine=small, max_jobs=1):
            struck = Fault(worker, signal.SIGKILL)
            await struck.over(office, *jobs)
            assert {(await office.row(job)).attempt for job in jobs} == {2}


async def test_a_job_that_kills_every_worker_fails(office: Office, notes: Notes) -> None:
    """Each was the only one, and held a lock."""
    locking = await office.enqueue("hold_lock", "go")
    async with process(office, notes) as one:
        await notes.say(locking, "locked")
        job = await office.enqueue("deadly")
        assert await one.exit_status() == -signal.SIGKILL
    died = time.monotonic()
    notes.let("go")
    async with process(office, notes) as two:
        assert await two.exit_status(within=PROMISED) == -signal.SIGKILL
        assert time.monotonic() - died < PROMISED
    async with process(office, notes, heartbeat_process=False):
        row = await office.final(job, within=PROMISED)
        assert (row.state, row.attempt) == ("failed", 2)
        assert row.error == "the worker that ran it died (attempt 2 of 2)"
        assert [attempt for attempt, _, _ in notes.of(job)] == [1, 2]
        assert row.deaths == 2
        assert (await office.final(locking)).state == "done"
        assert len(await office.effects(locking)) == 1
        await office.nothing_left_in_redis()


async def test_the_one_that_kills_its_workers_fails_and_its_neighbours_finish(office: Office, notes: Notes) -> None:
    """Once it is clear who it may have been, at most one suspect is aboard, beside what is innocent."""
    neighbours = [await office.enqueue("slow", 2.0) for _ in range(4)]
    poison = await office.enqueue(task_options("poison", max_attempts=3))
    for _ in range(12):
        async with process(office, notes) as worker:

            async def is_over() -> bool:
                rows = [await office.row(job) for job in (poison, *neighbours)]
                return all(row.state.is_final for row in rows) or worker.process.returncode is not None

            await eventually(is_over, within=40)
            if worker.process.returncode is None:
                break
    rows = [await office.row(job) for job in neighbours]
    assert {(row.state, row.deaths <= 1) for row in rows} == {("done", True)}
    row = await office.row(poison)
    assert (row.state, row.deaths, row.attempt - row.uncounted) == ("failed", 3, 3)
    assert row.error == "the worker that ran it died (attempt 3 of 3)"


@pytest.mark.parametrize("busy", ["sleeps", "counts"])
async def test_a_worker_whose_task_lets_nothing_else_run_lives(office: Office, notes: Notes, busy: str) -> None:
    """Neither its event loop nor, while the interpreter's lock is held, its threads; `arq --check` says which task.

    It is not robbed: for eight seconds it does nothing, and its heart beats.
    """
    async with process(office, notes) as worker, process(office, notes) as other:
        jobs = [await office.enqueue(task, "go") for task in ("hold", "hold", "plain", "plain")]
        for job in jobs:
            await notes.say(job, "starts")
        blocking = await office.enqueue("block" if busy == "sleeps" else "count", DEAD_SECONDS + 2)
        await notes.say(blocking, "starts")

        async def is_told() -> bool:
            told = [await office.redis.get(key) or b"" for key in await office.redis.keys("*health*")]
            return any(b"blocked" in text or b"j_ongoing=0" in text for text in told)

        await eventually(is_told, within=DEAD_SECONDS + 2)
        await office.final(blocking, within=25)
        notes.let("go")
        for job in jobs:
            await office.final(job, within=10)
        assert all(len(notes.of(job, "starts")) == 1 for job in [*jobs, blocking])
        robbed = "is dead|taken for dead|not to be found|superseded"
        assert worker.count(robbed) + other.count(robbed) == 0
        assert {row.deaths for row in [await office.row(job) for job in [*jobs, blocking]]} == {0}
        for job in jobs[:2] if busy == "counts" else [*jobs[:2], blocking]:  # which write their effect
            assert await how(office, job) == ("done", 1, (1,))


async def test_nobody_is_robbed_because_postgresql_was_away(notes: Notes, redis_url: str) -> None:
    """For longer than a worker that does not say that it lives is taken to live."""
    with fragile_postgresql() as server:
        async with prepared(server, redis_url) as office:
            async with process(office, notes) as worker, process(office, notes) as other:
                jobs = [await office.enqueue("hold", "go") for _ in range(8)]
                for job in jobs:
                    await notes.say(job, "starts")
                await asyncio.to_thread(server.stop, "immediate")
                await asyncio.sleep(DEAD_SECONDS + 1)
                await asyncio.to_thread(server.start)
                await worker.says("PostgreSQL answers again")
                await asyncio.sleep(2)  # in which somebody might be taken for dead
                assert len(notes.all()) == len(jobs), "a second attempt began, though the first one was alive"
                notes.let("go")
                async with opened(server.url, redis_url) as office:
                    for job in jobs:
                        assert (await office.final(job)).state == "done"
                        assert len(await office.effects(job)) == 1
                assert worker.count("is dead|taken for dead") + other.count("is dead|taken for dead") == 0


async def test_a_worker_cut_off_from_postgresql_alone_gives_up_its_jobs_once(office: Office) -> None:
    """It still hears Redis, and would claim again and again what it cannot run."""
    ran: list[str] = []
    go = asyncio.Event()

    def tasks(worker: str) -> list[Any]:
        async def task(ctx: dict[str, Any]) -> None:
            ran.append(worker)
            await go.wait()
            async with job_transaction(ctx):
                pass

        return [func(task, name="task")]

    async with Network(office.database_url).opened() as network:
        network.up = True
        async with working(office, tasks("cut off"), database_url=network.url, max_jobs=20) as worker:
            jobs = [await office.enqueue("task") for _ in range(5)]
            await eventually(lambda: len(ran) == 5)

            async def are_named() -> bool:
                return any(len(row.jobs) == 5 for row in await office.workers())

            await eventually(are_named)
            network.cut()
            cut = time.monotonic()
            async with working(office, tasks("other"), max_jobs=20):
                await eventually(lambda: ran.count("other") == 1, within=PROMISED)
                assert time.monotonic() - cut < PROMISED
                more = [await office.enqueue("task") for _ in range(10)]
                await eventually(lambda: ran.count("other") == 11, within=5)
                go.set()
                rows = [await office.final(job) for job in [*jobs, *more]]
                assert [(row.state, row.attempt) for row in rows] == [("done", 2)] * 5 + [("done", 1)] * 10
                assert ran.count("cut off") == 5
                network.up = True
            assert (await office.final(await office.enqueue("task"))).state == "done"
            assert ran.count("cut off") == 6
            assert worker.lives


async def test_after_flushall_everything_queued_is_back_and_nothing_runs_twice(office: Office, notes: Notes) -> None:
    few: dict[str, Any] = {"heartbeat_process": False, "COORD_TEST_MAX_JOBS": "5"}
    async with process(office, notes, **few), process(office, notes, **few):
        held = [await office.enqueue("hold", "go") for _ in range(10)]
        for job in held:
            await notes.say(job, "starts")
        queued = [await office.enqueue("quick") for _ in range(200)]
        later = await office.enqueue(task_options("quick", delay=60))
        await office.waiting(len(queued) + 1)
        await office.redis.flushall()
        flushed = time.monotonic()
        await office.waiting(len(queued) + 1, within=PROMISED)
        assert time.monotonic() - flushed < PROMISED
        notes.let("go")
        for job in [*held, *queued]:
            await office.final(job, within=20)
        ran = [job for job, _, _, what in notes.all() if what == "starts"]
        assert sorted(ran) == sorted(str(job.id) for job in [*held, *queued])
        assert {row.attempt for row in [await office.row(job) for job in held]} == {1}
        ((_, score),) = await office.redis.zrange(KEYS.soon, 0, -1, withscores=True)
        late = score / 1000 - later.scheduled_at.timestamp()
        assert -0.05 < late < 1  # between PostgreSQL's clock and Redis' lies the way through a busy worker


async def test_an_attempt_that_died_with_its_worker_leaves_a_row(office: Office, notes: Notes) -> None:
    async def hold(ctx: dict[str, Any], name: str) -> None:
        """Where it runs again it has nothing to wait for."""

    async with process(office, notes) as victim:
        job = await office.enqueue("hold", "never")
        await notes.say(job, "starts")
        (worker,) = [row.id for row in await office.workers()]
        async with working(office, [func(hold, name="hold")]):
            victim.signal(signal.SIGKILL)
            assert (await office.final(job, within=2 * PROMISED)).attempt == 2
    async with office.session_maker() as session:
        (row,) = (await session.execute(select(attempts))).all()
    assert (row.job_id, row.number, row.worker, row.pid) == (job.id, 1, worker, victim.pid)
    assert (row.host, row.outcome, row.error) == (socket.gethostname(), "died", "the worker that ran it died")
    assert job.created_at <= row.began <= row.ended


async def test_a_job_that_was_handed_back_is_not_taken_from_who_runs_it_when_its_first_worker_dies(
    office: Office,
) -> None:
    """It is killed between the hand-back and its next heartbeat: the last one still names the job."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    attempts_begun: list[int] = []

    async def task(ctx: dict[str, Any]) -> None:
        attempts_begun.append(ctx["job_try"])
        begun.set()
        await go_on.wait()

    async with working(office, [task]):
        job = await office.enqueue(task)
        await begun.wait()

        async def is_named() -> bool:
            return any(str(job.id) in worker.jobs for worker in await office.workers())

        await eventually(is_named)
        gone = {"id": uuid4(), "queue": KEYS.queue, "host": "gone", "pid": 1, "dead": True, "stopping": True}
        async with office.session_maker.begin() as session:
            await session.execute(insert(workers).values(gone | {"jobs": {str(job.id): {"attempt": 1}}}))

        async def is_rescued() -> bool:
            return gone["id"] not in [worker.id for worker in await office.workers()]

        await eventually(is_rescued)
        go_on.set()
        row = await office.final(job)
    assert (row.state, row.attempt, row.hand_backs) == ("done", 1, 0)
    assert attempts_begun == [1]
