"""Workers under test: some in this process and its event loop, some as `arq` runs them, and what they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from arq.connections import ArqRedis
from arq.worker import Worker, create_worker
from redis.asyncio import ConnectionPool
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import Coordinator, Job, create_ledger, enqueue, worker_settings
from coord.dev.embedded import PostgreSQL
from coord.jobs.model import jobs, workers
from coord.queue.keys import RANK_SHIFT, QueueKeys
from coord.queue.message import Message
from coord.worker.address import Address
from coord.worker.config import WorkerConfig
from coord.worker.maintenance.beat import Board
from coord.worker.running import RunningJobs
from coord.worker.state import WorkerState
from tests import warm
from tests.clusters import lay
from tests.models import User, table_of
from tests.pooler import UNTOLD
from tests.serving import eventually
from tests.shop import Command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from uuid import UUID

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.ledger import SessionMaker


EFFECTS = "CREATE TABLE IF NOT EXISTS effects (job uuid, attempt int, pid int)"


KEYS = QueueKeys()


def given(pipe: Any, *jobs: Job) -> None:
    """Hand jobs over as a coordinator does, by whoever has the pipeline."""
    for job in jobs:
        pipe.zadd(KEYS.feed, {Message.of(job).text(): fresh()})


def fresh() -> int:
    """The score of a job that is due now; the test's servers share its clock."""
    return 100 * RANK_SHIFT + time.time_ns() // 1_000_000


class Office:
    """Where jobs come from and are watched: sessions with a coordinator, and a Redis client to look with."""

    def __init__(self, session_maker: SessionMaker, redis: ArqRedis, redis_url: str, database_url: str) -> None:
        self.session_maker = session_maker
        self.redis = redis
        self.redis_url = redis_url
        self.database_url = database_url

    async def enqueue(self, task: Any, *args: Any, **kwargs: Any) -> Job:
        """A committed job, which this process hands over if it has a coordinator."""
        async with self.session_maker() as session:
            job = await enqueue(session, task, *args, **kwargs)
            await session.commit()
        return job

    async def row(self, job: Job | UUID) -> Row[Any]:
        statement = select(jobs).where(jobs.c.id == (job.id if isinstance(job, Job) else job))
        async with self.session_maker() as session:
            return (await session.execute(statement)).one()

    async def effects(self, job: Job) -> list[int]:
        """The attempts whose effect is there."""
        statement = text("SELECT attempt FROM effects WHERE job = :job")
        async with self.session_maker() as session:
            return [*await session.scalars(statement, {"job": job.id})]

    async def lose(self, job: Job) -> None:
        """Have it popped by somebody who dies before he has told anybody."""
        async with self.redis.pipeline(transaction=True) as pipe:
            given(pipe, job)
            pipe.zrem(KEYS.feed, Message.of(job).text())
            assert (await pipe.execute())[1] == 1

    async def workers(self) -> Sequence[Row[Any]]:
        async with self.session_maker() as session:
            return (await session.execute(select(workers).order_by(workers.c.id))).all()

    async def final(self, job: Job | UUID, within: float = 10.0) -> Row[Any]:
        """The job's row, once it has ended."""

        async def ended() -> Row[Any] | None:
            row = await self.row(job)
            return row if row.state.is_final else None

        found: Row[Any] = await eventually(ended, within=within, message=f"{job} has not ended within {within} s")
        return found

    async def put(self, message: str | bytes, score: float = 1) -> None:
        """A message for workers, from whoever can write to Redis."""
        raw = message if isinstance(message, bytes) else message.encode()
        await self.redis.zadd(KEYS.feed, {raw: score})

    async def waiting(self, count: int, within: float = 5.0) -> None:
        """Return when so many jobs wait in Redis, for their time or for a slot."""

        async def are() -> bool:
            return int(await self.redis.zcard(KEYS.feed)) + int(await self.redis.zcard(KEYS.soon)) == count

        await eventually(are, within=within)

    async def left_in_redis(self) -> list[str]:
        """Keys, but for what says that workers live, what they took a moment ago, and what counts Redis' age."""
        own = (KEYS.epoch, KEYS.taken)
        keys = [key.decode() for key in await self.redis.keys("*")]
        return sorted(key for key in keys if "health" not in key and key not in own)

    async def nothing_left_in_redis(self, within: float = 5.0) -> None:
        async def nothing() -> bool:
            return not await self.left_in_redis()

        try:
            await eventually(nothing, within=within)
        except AssertionError:
            raise AssertionError(f"left in Redis: {await self.left_in_redis()}") from None


def client(redis_url: str, **options: Any) -> ArqRedis:
    """Stock arq's own client; closed, it closes its connections."""
    redis = ArqRedis(ConnectionPool.from_url(redis_url), **options)
    redis.auto_close_connection_pool = True
    return redis


@contextlib.asynccontextmanager
async def opened(database_url: str, redis_url: str, *, coordinated: bool = True) -> AsyncIterator[Office]:
    engine = create_async_engine(database_url, pool_size=10, max_overflow=20)
    session_maker = async_sessionmaker(engine, expire_on_commit=False)
    redis = client(redis_url)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.dispose)
        stack.push_async_callback(redis.aclose)
        if coordinated:
            await stack.enter_async_context(Coordinator(session_maker, redis=redis_url))
        yield Office(session_maker, redis, redis_url, database_url)


@pytest.fixture
async def script(office: Office) -> AsyncIterator[Office]:
    """Enqueues without a coordinator: nobody hands its jobs over at once."""
    async with opened(office.database_url, office.redis_url, coordinated=False) as script:
        yield script


@pytest.fixture
async def office(ledger: None, database_url: str, redis_url: str) -> AsyncIterator[Office]:
    """With the ledger and Redis empty, and a coordinator."""
    async with opened(database_url, redis_url) as office:
        await office.redis.flushdb()
        async with office.session_maker.begin() as session:
            await session.execute(text(EFFECTS))
            await session.execute(text("DELETE FROM effects"))
        yield office


def a_state(engine: AsyncEngine, redis: Any = None, **config: Any) -> WorkerState:
    """What one part of a worker is given that is tested alone."""
    maker = async_sessionmaker(engine, expire_on_commit=False)
    limits = {"max_jobs": 2, "max_attempts": 10, "job_timeout": 300.0, "idle_limit": 60.0, "grace": 1.0, "keep": 60.0}
    rest: dict[str, Any] = {"unknown_after": None, "health_check_key": "health", "hooks": {}, "tasks": {}, "keys": KEYS}
    told = {"session_maker": maker, "address": Address("redis://127.0.0.1:1/0"), **limits, **rest, **config}
    board = Board(2)
    made = WorkerConfig(**told)
    return WorkerState(config=made, engine=engine, redis=redis, board=board, running=RunningJobs(board, made.tasks))


@contextlib.contextmanager
def fragile_postgresql() -> Iterator[PostgreSQL]:
    """A server that a test may harm. Not in pytest's directory, which the next session closes to the server's user."""
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as directory:
        with PostgreSQL(lay(Path(directory) / "postgresql"), settings={"fsync": "off"}) as server:
            yield server


@contextlib.asynccontextmanager
async def prepared(server: PostgreSQL, redis_url: str) -> AsyncIterator[Office]:
    """A server of the test's own, with everything that tasks need."""
    async with opened(server.url, redis_url) as office:
        await office.redis.flushdb()
        async with office.session_maker.begin() as session:
            await create_ledger(await session.connection())
            await (await session.connection()).run_sync(User.metadata.create_all, tables=[table_of(User)])
            await session.execute(text(EFFECTS))
        yield office


class Working:
    """A worker of this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.task = asyncio.create_task(worker.async_run())

    @property
    def lives(self) -> bool:
        return not self.task.done()

    @property
    def running(self) -> RunningJobs:
        found: RunningJobs = self.worker.ctx["coord.lifecycle"].state.running
        return found

    async def started(self, within: float = 10.0) -> None:
        async def begun() -> bool:
            if self.task.done():
                self.task.result()
            return "coord.lifecycle" in self.worker.ctx

        await eventually(begun, within=within)

    async def stop(self) -> None:
        """As arq's own `run` ends when it is told to."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # arq closes its client so
            await self.worker.close()


@contextlib.asynccontextmanager
async def working(
    office: Office,
    functions: Sequence[Any],
    *,
    engine: dict[str, Any] | None = None,
    heartbeat_process: bool = False,
    **settings: Any,
) -> AsyncIterator[Working]:
    """A worker of this process that takes jobs, with an engine of its own unless it is given a `session_maker`.

    Its heartbeat is a thread, unless the test is about the process that it is elsewhere, which takes a second to start.
    """
    database_url = settings.pop("database_url", office.database_url)
    connections = {} if heartbeat_process else UNTOLD
    own = create_async_engine(database_url, **{"pool_size": 15, "max_overflow": 5, **connections, **(engine or {})})
    options = {"redis": office.redis_url, "handle_signals": False, **settings}
    options.setdefault("session_maker", async_sessionmaker(own, expire_on_commit=False))
    made = worker_settings(functions, **options)
    found = Working(create_worker(made))
    try:
        await found.started()
        yield found
    finally:
        await found.stop()
        await own.dispose()


class Process(Command):
    """A worker as `arq` runs it, with `tests.worker_app`'s tasks, which tell what they do in a file."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def stop(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        return await super().stop()


class Notes:
    """What tasks in processes say, a line each: job, attempt, process, what."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "notes"

    def all(self) -> list[tuple[str, int, int, str]]:
        if not self.file.exists():
            return []
        lines = [line.split(" ", 3) for line in self.file.read_text().splitlines()]
        return [(job, int(attempt), int(pid), what) for job, attempt, pid, what in lines]

    def of(self, job: Job, what: str | None = None) -> list[tuple[int, int, str]]:
        return [
            (attempt, pid, said)
            for id_, attempt, pid, said in self.all()
            if id_ == str(job.id) and what in (None, said)
        ]

    async def say(self, job: Job, what: str, *, times: int = 1, within: float = 15.0) -> tuple[int, int, str]:
        """The last of so many notes, waited for."""
        message = f"{job} never said {what!r} {times} times, but {self.of(job)}"
        await eventually(lambda: len(self.of(job, what)) >= times, within=within, message=message)
        return self.of(job, what)[times - 1]

    def let(self, name: str) -> None:
        """Release whoever waits for that name."""
        (self.directory / name).touch()


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path)


@contextlib.asynccontextmanager
async def process(
    office: Office,
    notes: Notes,
    *options: str,
    started: bool = True,
    module: str = "tests.worker_app.Settings",
    heartbeat_process: bool = True,
    **variables: str,
) -> AsyncIterator[Process]:
    """A worker as a process of its own, which takes jobs; its heartbeat's is another, or a thread."""
    environment = {
        "COORD_DATABASE_URL": office.database_url,
        "COORD_REDIS_URL": office.redis_url,
        "COORD_TEST_NOTES": str(notes.directory),
        "COORD_TEST_GRACE": "1",
        "COORD_TEST_HEARTBEAT": "process" if heartbeat_process else "thread",
    }
    running = Process(await warm.start("arq", module, *options, env={**os.environ, **environment, **variables}))
    try:
        if started:
            await running.says("Takes jobs")
        yield running
    finally:
        if running.process.returncode is None:
            await running.stop()
