"""arq as it is: its own jobs, settings, hooks, checks and bursts, beside the jobs of the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import warnings
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from arq import cron
from arq.jobs import DeserializationError, JobStatus, deserialize_job_raw, serialize_job
from arq.worker import Retry, Worker, async_check_health, create_worker, func, get_kwargs
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import pause_queue, worker_settings
from coord.dev.embedded import Valkey
from coord.worker.settings import DEFAULTS, REFUSED
from tests import warm
from tests.commands import started
from tests.serving import eventually
from tests.workers import Notes, Office, client, opened, process, working
from worker import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from asyncpg import Connection


async def succeed(ctx: dict[str, Any], *args: Any) -> Any:
    return args


@pytest.fixture
async def made(database_url: str, redis_url: str) -> AsyncIterator[Callable[..., Any]]:
    """Settings classes that nobody runs."""
    engine = create_async_engine(database_url)
    session_maker = async_sessionmaker(engine)

    def make(functions: Any = (succeed,), **options: Any) -> Any:
        return worker_settings(functions, session_maker=session_maker, **{"redis": redis_url, **options})

    yield make
    await engine.dispose()


async def test_arq_is_given_its_settings_as_they_are(made: Callable[..., Any]) -> None:
    """It reads them from the class itself, where nothing is inherited."""
    given = {"queue_name": "arq:queue", "max_tries": 3, "keep_result": 60, "poll_delay": 0.1, "job_serializer": repr}
    settings: dict[str, Any] = get_kwargs(made(**given))
    assert {name: settings[name] for name in given} == given
    assert "redis_pool" not in settings
    assert "job_deserializer" not in settings
    assert vars(made())["queue_name"] == "arq:queue:coord:default"


def test_the_shops_worker_unpickles_nothing_that_somebody_wrote_into_arqs_queue(tmp_path: Path) -> None:
    """As docs/security.md says that yours should, if it can; arq does unless it is told."""
    touched = tmp_path / "touched"

    class Forged:
        def __reduce__(self) -> Any:
            return touched.touch, ()

    settings: dict[str, Any] = get_kwargs(Settings)
    serializer, deserializer = settings["job_serializer"], settings["job_deserializer"]
    forged = pickle.dumps({"t": None, "f": "fulfil_order", "a": (Forged(),), "k": {}, "et": 0})
    with pytest.raises(DeserializationError):
        deserialize_job_raw(forged, deserializer=deserializer)
    assert not touched.exists()
    plain = serialize_job("task", (1,), {"two": 2}, None, 3, serializer=serializer)
    assert [*deserialize_job_raw(plain, deserializer=deserializer)] == ["task", [1], {"two": 2}, None, 3]
    deserialize_job_raw(forged)
    assert touched.exists()


@pytest.mark.parametrize("name", [*REFUSED, "max_job"])
async def test_a_setting_that_would_not_be_kept_is_refused(made: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=name):
        made(**{name: 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_jobs", 0),
        ("max_jobs", 1.5),
        ("max_tries", 0),
        ("job_timeout", 0),
        ("grace", -1),
        ("queue", ""),
        ("queue", "a\0b"),
        ("queue", "x" * 501),
        ("namespace", "\ud800"),
        ("keep", ""),
        ("idle_limit", 0.0001),
        ("idle_limit", timedelta(days=30)),
    ],
)
async def test_a_setting_that_makes_no_sense_is_refused(made: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        made(**{name: value})


@pytest.mark.parametrize("functions", [succeed, func(succeed), "tests.workers.succeed"], ids=["one", "arq's", "text"])
async def test_one_function_where_a_list_is_expected_is_a_type_error_that_says_so(
    made: Callable[..., Any], functions: Any
) -> None:
    with pytest.raises(TypeError, match=r"functions is a list of tasks, .*, not .*succeed"):
        made(functions)


async def test_a_place_of_redis_that_is_none_names_the_argument_and_shows_no_password(made: Callable[..., Any]) -> None:
    for url in ("nonsense", "http://:secret@localhost", "redis://:secret@localhost:x"):
        with pytest.raises(ValueError, match=r"redis is a URL, redis://localhost:6379/0 say, or arq's") as refused:
            made(redis=url)
        assert "secret" not in str(refused.value)
    with pytest.raises(TypeError, match="redis is a URL"):
        made(redis=Redis())


async def test_two_tasks_of_one_name_are_refused(made: Callable[..., Any]) -> None:
    async def other(ctx: dict[str, Any]) -> None:
        """Another of that name."""

    other.__qualname__ = succeed.__qualname__
    with pytest.raises(ValueError, match="two tasks are called succeed"):
        made([succeed, other])
    made([succeed, func(succeed), func(other, name="other")])


async def test_a_setting_that_is_set_later_counts(office: Office) -> None:
    async def slow(ctx: dict[str, Any]) -> None:
        await asyncio.sleep(30)

    engine = create_async_engine(office.database_url, pool_size=12)
    settings: Any = worker_settings(
        [slow], session_maker=async_sessionmaker(engine), redis=office.redis_url, handle_signals=False
    )
    settings.job_timeout = 0.2
    async with hosted(settings):
        row = await office.final(await office.enqueue(slow))
    assert row.error == "AttemptTimeoutError: the attempt took longer than 0.2 s"
    assert {*DEFAULTS} == {"max_jobs", "job_timeout", "max_tries"}


@contextlib.asynccontextmanager
async def hosted(settings: Any, **options: Any) -> AsyncIterator[Any]:
    """A worker in somebody else's event loop, as `create_worker` makes it."""
    worker = create_worker(settings, **options)
    task = asyncio.create_task(worker.async_run())
    try:
        await eventually(lambda: "coord.lifecycle" in worker.ctx or task.done())
        yield worker
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            await worker.close()


async def test_a_worker_in_another_server_leaves_its_signals_alone(office: Office) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    engine = create_async_engine(office.database_url, pool_size=12)
    settings = worker_settings([succeed], session_maker=async_sessionmaker(engine), redis=office.redis_url)
    async with hosted(settings, handle_signals=False):
        assert (await office.final(await office.enqueue(succeed))).state == "done"
        assert {number: signal.getsignal(number) for number in before} == before
    assert {number: signal.getsignal(number) for number in before} == before


async def test_two_settings_classes_share_a_process_and_each_takes_its_own_queue(office: Office) -> None:
    ran: list[str] = []

    def task_of(name: str) -> Any:
        async def task(ctx: dict[str, Any]) -> None:
            ran.append(name)

        return func(task, name=f"task {name}")

    from coord import task_options

    async with working(office, [task_of("a")], queue="a"), working(office, [task_of("b")], queue="b"):
        for name in "abab":
            job = await office.enqueue(task_options(f"task {name}", queue=name))
            assert (await office.final(job)).state == "done"
    assert ran == ["a", "b", "a", "b"]


def test_one_settings_class_runs_in_two_loops_one_after_another(database_url: str, redis_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=12)
    session_maker = async_sessionmaker(engine)
    settings = worker_settings([succeed], session_maker=session_maker, redis=redis_url, handle_signals=False)

    async def run() -> None:
        async with opened(database_url, redis_url) as office, hosted(settings):
            assert (await office.final(await office.enqueue(succeed))).state == "done"

    for _ in range(2):
        with asyncio.Runner() as runner:
            runner.run(run())


# Its own jobs


class Project:
    """An arq project, which knows nothing of a ledger: pickled jobs by producers that are not changed."""

    def __init__(self, redis_url: str) -> None:
        self.redis = client(redis_url)
        self.ran: list[Any] = []
        self.hooks: Counter[str] = Counter()
        self.cron = asyncio.Event()
        self.held = asyncio.Event()
        self.go = asyncio.Event()

    async def greet(self, ctx: dict[str, Any], name: Any) -> Any:
        self.ran.append((ctx["job_try"], name, ctx["from startup"], ctx["from hook"]))
        if name == "again" and ctx["job_try"] == 1:
            raise Retry(defer=0.01)
        if name == "held":
            self.held.set()
            await self.go.wait()
        return {name}

    def settings(self) -> dict[str, Any]:
        async def greet(ctx: dict[str, Any], name: Any) -> Any:
            return await self.greet(ctx, name)

        async def tick(ctx: dict[str, Any]) -> None:
            self.cron.set()

        async def on_startup(ctx: dict[str, Any]) -> None:
            ctx["from startup"] = "seen"

        async def on_job_start(ctx: dict[str, Any]) -> None:
            ctx["from hook"] = "seen"

        def counted(name: str) -> Any:
            async def hook(ctx: dict[str, Any]) -> None:
                self.hooks[name] += 1

            return hook

        return {
            "functions": [func(greet, name="greet", keep_result=60)],
            "cron_jobs": [cron(tick, run_at_startup=True)],
            "on_startup": on_startup,
            "on_job_start": on_job_start,
            **{name: counted(name) for name in ("on_job_end", "after_job_end", "on_shutdown")},
            "queue_name": "arq:queue",
            "poll_delay": 0.05,
        }

    async def run_by_arq_until_held(self, redis_url: str) -> None:
        """By arq's own worker, which is then stopped as a deployment stops it."""
        worker = Worker(redis_pool=client(redis_url), handle_signals=False, **self.settings())
        task = asyncio.create_task(worker.async_run())
        await self.held.wait()
        await eventually(lambda: sum(not job.done() for job in worker.tasks.values()) == 1)
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            await worker.close()
        await asyncio.wait([task])


async def test_an_arq_project_that_moves_loses_nothing(office: Office) -> None:
    """What its producers have queued, and go on queueing, is run as by arq; and so are jobs of the ledger."""
    project = Project(office.redis_url)
    names = ["plain", ("a", "tuple"), {"a set"}, "again"]
    before = [await project.redis.enqueue_job("greet", name) for name in names]
    deferred = await project.redis.enqueue_job("greet", "deferred", _defer_by=0.5)
    settings = project.settings()
    async with working(office, settings.pop("functions"), **settings):
        after = await project.redis.enqueue_job("greet", "after")
        ours = await office.enqueue("greet", "ours")
        for job, name in zip([*before, deferred, after], [*names, "deferred", "after"], strict=True):
            assert job is not None
            with contextlib.suppress(TypeError):
                assert await job.result(timeout=10, poll_delay=0.02) == {name}
                assert await job.status() is JobStatus.complete
        assert (await office.final(ours)).state == "done"
        await asyncio.wait_for(project.cron.wait(), 5)
    assert sorted(str(name) for _, name, *_ in project.ran) == sorted(
        map(str, [*names, "again", "deferred", "after", "ours"])
    )
    assert {(seen, hook) for *_, seen, hook in project.ran} == {("seen", "seen")}
    ended = len(project.ran) + 1  # with the cron job
    assert project.hooks == {"on_job_end": ended, "after_job_end": ended, "on_shutdown": 1}
    await project.redis.aclose()


async def test_what_arqs_own_worker_leaves_is_run_by_the_one_that_takes_its_place(office: Office) -> None:
    """What it had begun, what waits behind that, what has a name of its own, and the results that it has kept."""
    project = Project(office.redis_url)
    done = await project.redis.enqueue_job("greet", "before")
    held = await project.redis.enqueue_job("greet", "held")
    assert done is not None
    assert held is not None
    await project.run_by_arq_until_held(office.redis_url)
    named = await project.redis.enqueue_job("greet", "named", _job_id="mine")
    assert named is not None
    assert await project.redis.enqueue_job("greet", "named", _job_id="mine") is None
    project.go.set()
    settings = project.settings()
    async with working(office, settings.pop("functions"), **settings):
        ours = await office.enqueue("greet", "ours")
        for job, name in ((done, "before"), (held, "held"), (named, "named")):
            assert await job.result(timeout=20, poll_delay=0.02) == {name}
        assert (await office.final(ours)).state == "done"
    ran = Counter((tries, name) for tries, name, *_ in project.ran)
    assert ran == Counter([(1, "before"), (1, "held"), (2, "held"), (1, "named"), (1, "ours")])
    await project.redis.aclose()


async def test_somebody_elses_jobs_in_arqs_default_queue_are_left_alone(office: Office) -> None:
    redis = client(office.redis_url)
    job = await redis.enqueue_job("somebody_elses", {"what": "only he knows"})
    assert job is not None
    async with working(office, [succeed], poll_delay=0.02):
        for _ in range(3):
            await office.final(await office.enqueue(succeed))
        await asyncio.sleep(0.2)  # in which arq polls some times
        assert await job.status() is JobStatus.queued
    await redis.aclose()


@pytest.mark.parametrize("hook", ["on_job_start", "on_job_end", "after_job_end"])
async def test_a_hook_that_raises_ends_neither_arqs_own_job_nor_the_worker(office: Office, hook: str) -> None:
    ran: list[Any] = []

    async def bad(ctx: dict[str, Any]) -> None:
        raise ValueError("the hook's own")

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])

    redis = client(office.redis_url)
    options: dict[str, Any] = {hook: bad}
    async with working(office, [func(task, name="t")], queue_name="arq:queue", poll_delay=0.02, **options) as worker:
        for number in range(1, 3):
            await redis.enqueue_job("t")
            await eventually(lambda number=number: len(ran) == number)
        await asyncio.sleep(0.1)  # in which arq would hear of it
        assert worker.lives
    await redis.aclose()


# Health


async def check(office: Office, redis_url: str | None = None) -> int:
    """The status of `arq --check`."""
    variables = {"COORD_DATABASE_URL": office.database_url, "COORD_REDIS_URL": redis_url or office.redis_url}
    checking = await warm.start("arq", "--check", "tests.worker_app.Settings", env={**os.environ, **variables})
    return await asyncio.wait_for(checking.wait(), 30)


@pytest.mark.slow
async def test_arq_check_is_right_with_any_number_of_workers(office: Office, notes: Notes) -> None:
    async def is_healthy() -> bool:
        return await check(office) == 0

    async def is_sick() -> bool:
        return await check(office) == 1

    assert await is_sick()
    async with process(office, notes) as first, process(office, notes) as second:
        await eventually(is_healthy, within=5)
        await first.stop()
        await eventually(is_healthy, within=5)
        second.signal(signal.SIGKILL)
        await eventually(is_sick, within=12)


@pytest.mark.slow
async def test_arq_check_fails_without_redis_and_does_not_wait_for_it(office: Office) -> None:
    assert async_check_health.__qualname__ == "async_check_health", "by which it is told apart from a worker"
    assert await check(office, "redis://127.0.0.1:1/0") != 0


# Bursts


@pytest.mark.slow
@pytest.mark.parametrize("coordinated", [True, False])
async def test_a_burst_runs_what_is_due_in_the_ledger(
    office: Office, script: Office, notes: Notes, coordinated: bool
) -> None:
    source = office if coordinated else script
    jobs = [await source.enqueue("quick") for _ in range(3)]
    strange = await source.enqueue("nobody_knows")
    async with process(office, notes, "--burst", started=False, heartbeat_process=False) as worker:
        assert await worker.exit_status(within=30) == 0
    assert {(await office.row(job)).state for job in jobs} == {"done"}
    assert (await office.row(strange)).state == "queued"
    assert await office.workers() == []


@pytest.mark.slow
async def test_a_burst_goes_on_after_its_connections_were_lost(
    office: Office, notes: Notes, observer: Connection
) -> None:
    """What ran is not left in the middle, and what is due is run."""
    others = "SELECT array_agg(pid) FROM pg_stat_activity WHERE datname = current_database()"
    jobs = [await office.enqueue("hold", "go"), await office.enqueue("quick")]
    before = await observer.fetchval(others)
    async with process(office, notes, "--burst", started=False) as worker:
        for job in jobs:
            await notes.say(job, "starts")
        own = set(await observer.fetchval(others)) - set(before)
        await observer.execute("SELECT pg_terminate_backend(pid, 5000) FROM unnest($1::int[]) AS pid", list(own))
        jobs.append(await office.enqueue("quick"))
        notes.let("go")
        assert await worker.exit_status(within=30) == 0
    assert [(row.state, row.attempt) for row in [await office.row(job) for job in jobs]] == [("done", 1)] * 3
    assert await office.workers() == []


@pytest.mark.slow
async def test_a_burst_ends_although_its_queue_is_paused(office: Office, notes: Notes) -> None:
    async with office.session_maker() as session:
        await pause_queue(session)
        await session.commit()
    job = await office.enqueue("quick")
    async with process(office, notes, "--burst", started=False, heartbeat_process=False) as worker:
        assert await worker.exit_status(within=30) == 0
    assert (await office.row(job)).state == "queued"


@pytest.mark.slow
async def test_a_burst_stops_when_it_is_told_to(office: Office, notes: Notes) -> None:
    job = await office.enqueue("hold", "never")
    async with process(office, notes, "--burst", started=False, COORD_TEST_GRACE="0.2") as worker:
        await notes.say(job, "starts")
        worker.signal(signal.SIGTERM)
        assert await worker.exit_status(within=10) == 0
    assert (await office.row(job)).attempt == 1


# A Redis that refuses, and one that is none


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "refusal"), [(("min-replicas-to-write", "1"), "NOREPLICAS"), (("maxmemory", "1"), "OOM|maxmemory")]
)
async def test_what_redis_refuses_is_waited_out_and_said_as_what_it_is(
    ledger: None, database_url: str, tmp_path: Path, setting: tuple[str, str], refusal: str, caplog: Any
) -> None:
    import re

    async def tick(ctx: dict[str, Any]) -> None:
        """arq's own, each half second."""

    with Valkey(tmp_path / "valkey") as server:
        async with opened(database_url, server.url) as office:
            cron_jobs = [cron(tick, second=set(range(60)))]
            async with working(office, [succeed], cron_jobs=cron_jobs) as worker:
                assert (await office.final(await office.enqueue(succeed))).state == "done"
                await office.redis.config_set(*setting)
                job = await office.enqueue(succeed)
                await eventually(lambda: re.search(f"jobs wait: .*({refusal})", caplog.text), within=10)
                await office.redis.config_set(setting[0], "0")
                assert (await office.final(job, within=15)).state == "done"
                assert worker.lives


@pytest.mark.slow
async def test_a_redis_cluster_is_refused_with_a_sentence(office: Office, notes: Notes, tmp_path: Path) -> None:
    from coord.dev.server import free_port

    port = free_port()
    command = [str(Valkey(tmp_path).program), "--port", str(port), "--dir", str(tmp_path), "--cluster-enabled", "yes"]
    url = f"redis://127.0.0.1:{port}/0"
    async with started(*command, "--save", "", stdout=subprocess.DEVNULL):
        async with process(office, notes, started=False, COORD_REDIS_URL=url) as worker:
            assert await worker.exit_status(within=30) != 0, "\n".join(worker.lines)
            assert any("Redis Cluster" in line for line in worker.lines), "\n".join(worker.lines)
