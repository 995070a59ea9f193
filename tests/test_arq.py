"""What coord.worker takes for granted of arq: each of these fails when arq changes, and says where to look."""

# ruff: noqa: F401, F811 - fixtures are imported
from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from arq import cron
from arq.connections import ArqRedis
from arq.constants import default_queue_name
from arq.jobs import Job as ArqJob
from arq.jobs import JobStatus
from arq.worker import Function, Retry, RetryJob, Worker, create_worker, func, get_kwargs
from redis.asyncio.client import Pipeline
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import task_options, worker_settings
from coord.worker.messages import serialize
from tests.ledger import ledger
from tests.serving import eventually
from tests.shop import ROOT
from tests.workers import Notes, Office, client, notes, office, process, until, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Calls = list[tuple[str, ...]]

JSON: dict[str, Any] = {"job_serializer": serialize, "job_deserializer": json.loads}

SOME_ID = uuid.UUID("4f9b0f6e-0000-7000-8000-000000000000")


class Recording(ArqRedis):
    """Stock arq's Redis, which notes what it is asked."""

    def __init__(self, calls: Calls, **options: Any) -> None:
        super().__init__(**options)
        self.calls = calls

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        self.calls.append(tuple(map(str, args)))
        return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        assert transaction or not self.calls, "only the first, which logs the server's version, is none"
        return RecordingPipeline(self, transaction, shard_hint)


class RecordingPipeline(Pipeline):
    def __init__(self, redis: Recording, transaction: bool, shard_hint: str | None) -> None:
        super().__init__(redis.connection_pool, redis.response_callbacks, transaction, shard_hint)
        self._calls = redis.calls

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        self._calls.append(("now", *map(str, args)))
        return await super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call]

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        self._calls.append(("execute", *(" ".join(map(str, command)) for command, _ in self.command_stack)))
        return await super().execute(raise_on_error)


async def recorded(redis_url: str, task: str, **settings: Any) -> list[str]:
    """What a stock worker asks for one job, in order, without the numbers and what it polls."""
    redis = client(redis_url, **JSON)
    await redis.flushdb()
    await redis.enqueue_job(task, _job_id="J")
    calls: Calls = []
    pool = Recording(calls, connection_pool=redis.connection_pool, **JSON)
    options: dict[str, Any] = {"burst": True, "poll_delay": 0, "handle_signals": False, "keep_result": 0}
    options["health_check_interval"] = 10.0**12  # after which arq has nothing to say of its health
    worker = Worker([succeed, retry_once], redis_pool=pool, **{**options, **JSON, **settings})
    await worker.main()
    await asyncio.gather(*worker.tasks.values())
    await redis.aclose()
    return [" ".join(call) for call in calls]


def without_polls(calls: list[str]) -> list[str]:
    """arq looks at what it runs again and again, too."""
    polls = ("ZRANGEBYSCORE", "execute ZRANGE", "ZCARD", "execute INFO")
    told = [call for call in calls if not call.startswith(polls)]
    return told[:3] + [call for call in told[3:] if not call.startswith("now")]


async def succeed(ctx: dict[str, Any]) -> None:
    pass


async def retry_once(ctx: dict[str, Any]) -> None:
    if ctx["job_try"] == 1:
        raise Retry(defer=0.01)


async def test_arq_asks_its_pool_this_and_in_this_order_for_a_job(redis_url: str) -> None:
    """`ClaimPipeline` answers each of these for a claimed job."""
    watch, exists, score, claim, read, end = without_polls(await recorded(redis_url, "succeed"))
    assert watch == "now WATCH arq:in-progress:J"
    assert exists == "now EXISTS arq:in-progress:J"
    assert score == f"now ZSCORE {default_queue_name} J"
    assert claim.startswith("execute PSETEX arq:in-progress:J ")
    assert read == "execute GET arq:job:J INCRBY arq:retry:J 1 EXPIRE arq:retry:J 88400"
    keys = "arq:in-progress:J arq:retry:J arq:job:J"
    assert end == f"execute ZREM arq:abort J ZREM {default_queue_name} J DEL {keys}"


async def test_arq_reads_the_queue_by_this_call_alone(redis_url: str) -> None:
    """`WorkerRedis.zrangebyscore` waits in it, and is told by `num` how many ids arq takes."""
    calls = [call.split() for call in await recorded(redis_url, "succeed") if default_queue_name in call]
    reads = [call for call in calls if call[0] not in ("now", "execute", "ZCARD")]
    assert reads
    assert {(*call[:3], *call[4:]) for call in reads} == {
        ("ZRANGEBYSCORE", default_queue_name, "-inf", "LIMIT", "0", "100")
    }
    assert "start=self._queue_read_offset, num=count, max=now" in inspect.getsource(Worker._poll_iteration)


async def test_arq_says_by_these_calls_that_a_job_is_to_run_again(redis_url: str) -> None:
    """No ZREM of the queue: by that `ClaimPipeline` knows it from an end."""
    calls = without_polls(await recorded(redis_url, "retry_once"))
    assert calls[5].startswith(f"execute ZINCRBY {default_queue_name} ")
    assert calls[5].endswith(" J DEL arq:in-progress:J")
    assert calls[-1].startswith("execute ZREM arq:abort J ZREM")


async def test_arq_removes_what_it_does_not_run_by_these_calls(redis_url: str) -> None:
    calls = without_polls(await recorded(redis_url, "nobody"))
    keys = "arq:retry:J arq:in-progress:J arq:job:J"
    assert calls[-1] == f"execute DEL {keys} ZREM arq:abort J ZREM {default_queue_name} J"


async def test_arq_looks_for_aborted_jobs_by_these_calls(redis_url: str) -> None:
    calls = await recorded(redis_url, "succeed", allow_abort_jobs=True)
    assert any(call.startswith("execute ZRANGE arq:abort 0 -1 ZREMRANGEBYSCORE arq:abort ") for call in calls)
    read = next(call for call in calls if "GET arq:job:J" in call)
    assert read == "execute GET arq:job:J INCRBY arq:retry:J 1 EXPIRE arq:retry:J 88400 ZREM arq:abort J"


async def test_arq_keeps_a_cron_jobs_claim_for_a_minute(redis_url: str) -> None:
    calls = await recorded(redis_url, "succeed", cron_jobs=[cron(succeed, hour=0, run_at_startup=True)])
    (end,) = [call for call in calls if "PEXPIRE" in call]
    assert end.startswith("execute PEXPIRE arq:in-progress:cron:succeed:")
    assert " 60000 ZREM arq:abort cron:" in end
    assert f"ZREM {default_queue_name} cron:" in end


async def test_arq_ends_a_worker_in_this_order(redis_url: str) -> None:
    """The shift ends when no job runs any more, and before the connections do."""
    order: list[str] = []

    class Pool(ArqRedis):
        async def delete(self, *names: Any) -> Any:
            order.append(f"delete {' '.join(map(str, names))}")

        async def close(self, close_connection_pool: bool | None = None) -> None:
            order.append(f"close {close_connection_pool}")
            await self.aclose(close_connection_pool)

    async def slow(ctx: dict[str, Any]) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            order.append("job ends")

    async def on_shutdown(ctx: dict[str, Any]) -> None:
        order.append("on_shutdown")

    begun = asyncio.Event()
    redis = client(redis_url, **JSON)
    await redis.flushdb()
    await redis.enqueue_job(slow.__qualname__)
    pool = Pool(connection_pool=redis.connection_pool)
    worker = Worker([slow], redis_pool=pool, on_shutdown=on_shutdown, handle_signals=False, poll_delay=0, **JSON)
    running = asyncio.create_task(worker.async_run())
    await begun.wait()
    await worker.close()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert order == ["job ends", "delete arq:queue:health-check", "on_shutdown", "close True"]


async def test_arq_runs_a_job_again_when_it_raises_these_and_never_else(redis_url: str) -> None:
    async def task(ctx: dict[str, Any], kind: str) -> None:
        ran.append(kind)
        if ran.count(kind) == 1 and kind != "returns":
            errors = {"retry": Retry(), "job": RetryJob(), "cancelled": asyncio.CancelledError(), "fails": KeyError()}
            raise errors[kind]

    ran: list[str] = []
    redis = client(redis_url, **JSON)
    await redis.flushdb()
    kinds = ["retry", "job", "cancelled", "fails", "returns"]
    for kind in kinds:
        await redis.enqueue_job(task.__qualname__, kind)
    worker = Worker([task], redis_pool=redis, burst=True, handle_signals=False, poll_delay=0, **JSON)
    await worker.main()
    await redis.aclose()
    assert {kind: ran.count(kind) for kind in kinds} == dict(zip(kinds, [2, 2, 2, 1, 1], strict=True))


def test_what_arqs_exceptions_and_functions_say_is_where_it_is_read() -> None:
    assert Retry(defer=1.5).defer_score == 1500
    assert Retry().defer_score is None
    assert not issubclass(Retry, RetryJob)
    assert not issubclass(RetryJob, Retry)
    for made in (func(succeed, timeout=3, max_tries=2), cron(succeed, timeout=3, max_tries=2)):
        assert (made.coroutine, made.timeout_s, made.max_tries) == (succeed, 3, 2)
    assert Function.__dataclass_fields__.keys() >= {"name", "coroutine", "timeout_s", "max_tries"}


@pytest.fixture
async def made(database_url: str, redis_url: str) -> AsyncIterator[Callable[..., Any]]:
    """Settings classes that nobody runs."""
    engine = create_async_engine(database_url)
    session_maker = async_sessionmaker(engine)

    def make(functions: Any = (succeed,), **options: Any) -> Any:
        return worker_settings(list(functions), session_maker=session_maker, **{"redis": redis_url, **options})

    yield make
    await engine.dispose()


async def test_arq_reads_every_setting_from_the_class_itself(made: Callable[..., Any]) -> None:
    """It looks into `__dict__`, where nothing is inherited, and leaves out what `Worker` does not know."""
    settings = made(max_burst_jobs=3)
    given = {name: value for name, value in vars(settings).items() if not name.startswith("__")}
    assert get_kwargs(settings) == given
    assert given["max_burst_jobs"] == 3
    assert inspect.signature(Worker).parameters.keys() >= given.keys()


async def test_a_setting_that_arq_does_not_know_is_refused(made: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="max_job"):
        made(max_job=3)


def test_arq_reads_the_functions_before_it_takes_an_event_loop() -> None:
    """Which is when `worker_settings` makes it uvloop's."""
    loops: list[Any] = []

    class Functions(tuple[Any, ...]):
        __slots__ = ()

        def __iter__(self) -> Any:
            loops.append(asyncio.new_event_loop())
            asyncio.set_event_loop(loops[-1])
            return super().__iter__()

    def make() -> None:
        worker = Worker(Functions([succeed]), handle_signals=False)
        loops.append(worker.loop)
        asyncio.set_event_loop(None)
        worker.loop.close()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert loops[0] is loops[1]
    assert len(loops) == 2


async def test_a_worker_process_runs_on_uvloop(office: Office, notes: Notes) -> None:
    async with process(office, notes):
        job = await office.enqueue("loop")
        await notes.say(job, "uvloop")


async def test_arq_has_nothing_to_say_of_its_health(office: Office) -> None:
    """The keeper writes the key, and arq's own interval never ends."""
    async with working(office, [succeed]) as worker:
        key = worker.redis.health_check_key

        async def told() -> bytes | None:
            found: bytes | None = await office.redis.get(key)
            return found

        said = await eventually(told)
        assert b"j_ongoing=0" in said
        assert b"j_complete" not in said
        assert 0 < await office.redis.pttl(key) <= 6000
        assert worker.worker.health_check_interval > 10**9


def checked(office: Office, notes: Notes) -> int:
    """`arq --check`."""
    variables = {"COORD_DATABASE_URL": office.database_url, "COORD_REDIS_URL": office.redis_url}
    command = [sys.executable, "-m", "arq", "--check", "tests.worker_app.Settings"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, check=False
    ).returncode


@pytest.mark.slow
async def test_arq_check_is_right_with_any_number_of_workers(office: Office, notes: Notes) -> None:
    async def check() -> int:
        return await asyncio.to_thread(checked, office, notes)

    async def healthy() -> bool:
        return await check() == 0

    async def sick() -> bool:
        return await check() == 1

    assert await check() == 1
    async with process(office, notes) as first, process(office, notes) as second:
        await eventually(healthy, within=3)
        await first.stop()
        assert await check() == 0
        second.signal(signal.SIGKILL)
        await eventually(sick, within=8)
    async with process(office, notes) as third:
        await eventually(healthy, within=3)
        await third.stop()
        assert await check() == 1


@pytest.mark.slow
async def test_arq_check_fails_without_redis(office: Office, notes: Notes) -> None:
    office.redis_url = "redis://127.0.0.1:1/0"
    assert await asyncio.to_thread(checked, office, notes) != 0


async def test_arq_burst_ends_when_everything_is_done(office: Office, notes: Notes) -> None:
    jobs = [await office.enqueue("quick") for _ in range(20)]
    async with process(office, notes, "--burst", started=False) as worker:
        assert await worker.exit_status() == 0
    for job in jobs:
        assert (await office.row(job)).state == "done"
    assert await office.left_in_redis() == []
    assert await office.workers() == []


async def test_max_burst_jobs_is_kept(office: Office) -> None:
    """arq asks for no more than it may run, and is given no more."""
    ran = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])

    for _ in range(5):
        await office.enqueue(task)
    async with working(office, [task], burst=True, max_burst_jobs=2) as worker:
        await worker.running
        assert len(ran) == 2
    assert len(await office.redis.zrange(default_queue_name, 0, -1)) == 3


async def test_a_burst_worker_may_be_run_again_without_having_been_closed(office: Office) -> None:
    async with working(office, [succeed], burst=True) as worker:
        await worker.running
        job = await office.enqueue(succeed)
        await worker.worker.async_run()
        assert (await office.row(job)).state == "done"
        assert len(await office.workers()) <= 1  # the second shift may be over, and the first is


async def test_a_shift_asks_redis_nothing_before_the_last_one_has_closed_its_connections(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, closing, close = list[str](), asyncio.Event(), asyncio.Event()
    execute = Pipeline.execute

    async def tell(pipe: Any, *args: Any) -> Any:
        told.extend(str(command[0]) for command, _ in pipe.command_stack[:1])
        return await execute(pipe, *args)

    async def slowly(_ctx: dict[str, Any]) -> None:
        closing.set()
        await close.wait()
        told.append("over")

    monkeypatch.setattr(Pipeline, "execute", tell)
    async with working(office, [succeed], burst=True, on_shutdown=slowly) as worker:
        await worker.running
        again = asyncio.create_task(worker.worker.async_run())
        await closing.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        close.set()
        await again
    assert told == ["INFO", "over", "INFO", "over"]


async def test_a_worker_that_arq_gives_another_redis_refuses_to_work(made: Callable[..., Any], redis_url: str) -> None:
    """As `arq --watch` does after the first change: it would run jobs that it has not claimed."""
    other = client(redis_url)
    worker = create_worker(made(), redis_pool=other, handle_signals=False)
    with pytest.raises(SystemExit, match="--watch"):
        await worker.main()
    await other.aclose()


async def test_cron_jobs_run(office: Office) -> None:
    ran = asyncio.Event()

    async def at_midnight(ctx: dict[str, Any]) -> None:
        ran.set()

    async with working(office, [succeed], cron_jobs=[cron(at_midnight, hour=0, run_at_startup=True)]):
        await asyncio.wait_for(ran.wait(), 5)

        await office.queued(0)
        (claim,) = await office.left_in_redis()
        assert claim.startswith("arq:in-progress:cron:")
        for _ in range(
            3
        ):  # whoever enqueues it late finds that it has run: so it stays when the worker settles its claims
            await office.final(await office.enqueue(succeed))
        assert 50_000 < await office.redis.pttl(claim) <= 60_000


async def test_a_cron_job_has_the_workers_timeout(office: Office) -> None:
    ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def endless(ctx: dict[str, Any]) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ended.set_result(error)
            raise

    async with working(office, [succeed], cron_jobs=[cron(endless, run_at_startup=True)], job_timeout=0.1):
        await asyncio.wait_for(ended, 5)


class Plain:
    """Jobs that stock arq has enqueued, without a ledger."""

    def __init__(self, office: Office) -> None:
        self.redis = client(office.redis_url, **JSON)
        self.ran: list[tuple[int, tuple[Any, ...]]] = []

    async def enqueue(self, task: str, *args: Any, **options: Any) -> ArqJob:
        job = await self.redis.enqueue_job(task, *args, **options)
        assert job is not None
        return job


@pytest.fixture
async def stock(office: Office) -> AsyncIterator[Plain]:
    stock = Plain(office)
    yield stock
    await stock.redis.aclose()


async def test_what_stock_arq_enqueues_runs_and_leaves_nothing(office: Office, stock: Plain) -> None:
    async def task(ctx: dict[str, Any], *args: Any) -> str:
        stock.ran.append((ctx["job_try"], args))
        return "the result"

    async with working(office, [task]):
        await stock.enqueue(task.__qualname__, 1, "two", _job_id="one")
        await until(lambda: stock.ran)
        await office.nothing_left_in_redis()
    assert stock.ran == [(1, (1, "two"))]


async def test_stock_arqs_results_are_kept_if_asked_for(office: Office, stock: Plain) -> None:
    async def task(ctx: dict[str, Any]) -> dict[str, int]:
        return {"answer": 42}

    async with working(office, [task], keep_result=60):
        job = await stock.enqueue(task.__qualname__)
        assert await job.result(timeout=5, poll_delay=0.02) == {"answer": 42}
        assert await job.status() == JobStatus.complete


async def test_stock_arqs_jobs_are_retried_and_deferred_as_by_arq(office: Office, stock: Plain) -> None:
    times: list[float] = []

    async def task(ctx: dict[str, Any]) -> None:
        times.append(asyncio.get_running_loop().time())
        stock.ran.append((ctx["job_try"], ()))
        if ctx["job_try"] < 3:
            raise Retry(defer=0.3)

    async with working(office, [task]):
        enqueued = asyncio.get_running_loop().time()
        await stock.enqueue(task.__qualname__, _defer_by=0.3)
        await until(lambda: len(stock.ran) == 3)
        await office.nothing_left_in_redis()
    assert [number for number, _ in stock.ran] == [1, 2, 3]
    pauses = [after - before for before, after in zip([enqueued, *times], times, strict=False)]
    assert all(0.29 <= pause < 1.5 for pause in pauses), pauses


async def test_stock_arqs_jobs_have_the_workers_limits(office: Office, stock: Plain) -> None:
    async def task(ctx: dict[str, Any], kind: str) -> None:
        stock.ran.append((ctx["job_try"], (kind,)))
        if kind == "again":
            raise Retry
        await asyncio.Event().wait()

    async with working(office, [func(task, name="task", max_tries=2, timeout=0.2)]):
        for kind in ("again", "endless"):
            await stock.enqueue("task", kind)
        await office.nothing_left_in_redis()
    assert sorted(stock.ran) == [(1, ("again",)), (1, ("endless",)), (2, ("again",))]


async def test_stock_arqs_jobs_can_be_aborted(office: Office, stock: Plain) -> None:
    cancelled = asyncio.Event()
    begun = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with working(office, [task], allow_abort_jobs=True):
        job = await stock.enqueue(task.__qualname__)
        await begun.wait()
        await job.abort(timeout=5, poll_delay=0.02)
        assert cancelled.is_set()
        await office.nothing_left_in_redis()


async def test_arqs_own_client_sees_what_is_queued(office: Office, stock: Plain) -> None:
    job = await office.enqueue("task", 1, two=2)
    later = await office.enqueue(task_options("task", delay=60))
    await office.queued(2)
    first, second = await stock.redis.queued_jobs()
    assert (first.function, [*first.args], first.kwargs) == ("task", [1], {"two": 2})
    assert (first.job_try, first.job_id) == (1, str(job.id))
    assert abs(first.enqueue_time - datetime.now(UTC)) < timedelta(seconds=10)
    assert second.job_id == str(later.id)
    assert await ArqJob(str(job.id), stock.redis).status() == JobStatus.queued
    assert await ArqJob(str(later.id), stock.redis).status() == JobStatus.deferred


async def test_a_jobs_status_is_right_while_it_runs_and_it_leaves_nothing(office: Office, stock: Plain) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        await go.wait()

    async with working(office, [task]):
        job = await office.enqueue(task)
        await begun.wait()
        assert await ArqJob(str(job.id), stock.redis).status() == JobStatus.in_progress
        assert [found.job_id for found in await stock.redis.queued_jobs()] == [str(job.id)]
        go.set()
        assert (await office.final(job)).state == "done"
        await office.nothing_left_in_redis()
        assert await ArqJob(str(job.id), stock.redis).status() == JobStatus.not_found


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return open, (self.trace, "w")


@pytest.mark.parametrize("id_", [str(SOME_ID), SOME_ID.hex])
async def test_nothing_is_unpickled(office: Office, tmp_path: Any, id_: str) -> None:
    bomb = pickle.dumps({"t": 1, "f": "succeed", "a": (Bomb(str(tmp_path / "trace")),), "k": {}, "et": 0})
    async with working(office, [succeed]):
        await office.put(id_, bomb)
        await office.nothing_left_in_redis()
        assert (await office.final(await office.enqueue(succeed))).state == "done"
    assert not (tmp_path / "trace").exists()


SOUND: dict[str, Any] = {"t": None, "f": "succeed", "a": [], "k": {}, "et": 1_700_000_000_000}
UNSOUND: dict[str, bytes] = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a number": b"1",
    "a list": b"[]",
    "nothing": b"",
    **{
        f"{name} is {value!r}": json.dumps({**SOUND, name: value}).encode()
        for name, value in [
            ("et", "soon"),
            ("et", 2**52),
            ("et", -(2**52)),
            ("et", None),
            ("t", "first"),
            ("f", ["succeed"]),
            ("a", 5),
            ("k", []),
            ("c", 5),
            ("c", []),
            ("c", [None, None, None]),
            ("c", [None, 1e308, {"traceparent": 5}]),
        ]
    },
    **{
        f"of the ledger, {et}": json.dumps({**SOUND, "t": 1, "c": [None, None, None], "et": et}).encode()
        for et in (2**52, -(2**52))
    },
}


@pytest.mark.parametrize("id_", [str(SOME_ID), "anything"])
async def test_no_message_ends_a_worker(office: Office, id_: str) -> None:
    """Whoever can write to Redis can have written anything."""
    async with working(office, [succeed]) as worker:
        for name, text in UNSOUND.items():
            await office.put(id_, text)
            await office.nothing_left_in_redis()
            assert worker.lives, name
        assert (await office.final(await office.enqueue(succeed))).state == "done"


async def test_no_queue_entry_ends_a_worker(office: Office) -> None:
    async with working(office, [succeed]) as worker:
        entries: dict[Any, float] = {b"\xff\xfe": 1, "beginning": float("-inf"), "end": float("inf"), "far": 1e300}
        for id_, score in entries.items():
            await office.put(id_, json.dumps(SOUND), score)
        for key in ("arq:job:list", "arq:in-progress:claimed"):
            await office.redis.execute_command("RPUSH", key, "not a text")  # type: ignore[no-untyped-call]
        await office.redis.zadd(default_queue_name, {"nobody": 1, "list": 1, "claimed": 1})
        for _ in range(3):
            assert (await office.final(await office.enqueue(succeed))).state == "done"
        await office.redis.zrem(default_queue_name, "far")  # so that the next one is due at no time at all
        assert (await office.final(await office.enqueue(succeed))).state == "done"
        assert worker.lives

        async def left() -> set[bytes]:
            return {*await office.redis.zrange(default_queue_name, 0, -1)}

        async def only_those() -> bool:
            return await left() == {b"end", b"claimed"}

        await eventually(only_those, message=f"{await left()} are left")
