"""Each end that an attempt can come to, and what the ledger, Redis and arq say of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from arq.worker import Retry, RetryJob, func
from sqlalchemy import text

import coord.worker.failure
from coord import LockTimeoutError, cancel_job, enqueue, job_transaction, lock_tables, task_options
from coord.queue.keys import RANK_SHIFT
from coord.queue.message import Message
from coord.worker.failure import backoff
from tests.models import User
from tests.serving import eventually
from tests.workers import Office, fragile_postgresql, given, opened, prepared, working

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coord import Job
    from coord.dev.embedded import PostgreSQL

pytestmark = pytest.mark.usefixtures("tables")


async def apply(session: Any, ctx: dict[str, Any]) -> None:
    statement = text("INSERT INTO effects (job, attempt) VALUES (:job, :attempt)")
    await session.execute(statement, {"job": ctx["job_id"], "attempt": ctx["job_try"]})


async def test_a_job_is_done_in_the_commit_of_its_effect(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await apply(session, ctx)

    async with working(office, [task]):
        job = await office.enqueue(task)
        row = await office.final(job)
        await office.nothing_left_in_redis()
    assert (row.state, row.attempt, row.error) == ("done", 1, None)
    assert row.created_at <= row.started_at <= row.finished_at
    assert await office.effects(job) == [1]


async def test_a_plain_function_is_done_when_it_returns(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> str:
        return "what it was for"

    async with working(office, [task]):
        row = await office.final(await office.enqueue(task))
        await office.nothing_left_in_redis()
    assert (row.state, row.attempt, row.result) == ("done", 1, "what it was for")
    assert row.started_at <= row.finished_at


async def test_an_exception_is_final_and_recorded_with_its_traceback(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await apply(session, ctx)
            raise ValueError("out of\n  tea")

    async with working(office, [task]):
        job = await office.enqueue(task)
        row = await office.final(job)
        await office.nothing_left_in_redis()
    assert (row.state, row.attempt, row.error) == ("failed", 1, "ValueError: out of tea")
    assert 'raise ValueError("out of\\n  tea")' in row.traceback
    assert await office.effects(job) == []


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot say what it is")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a null \0 and half a pair \ud800"),
        ValueError("x" * 100_000),
        MuteError(),
        SystemExit(3),
        ValueError(),
    ],
    ids=["unstorable", "long", "mute", "exit", "wordless"],
)
async def test_whatever_a_task_raises_is_recorded_and_the_worker_lives(
    office: Office, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("arq.worker"), "disabled", True)  # pytest-xdist cannot send all of it

    async def task(ctx: dict[str, Any]) -> None:
        raise error

    async with working(office, [task]) as worker:
        row = await office.final(await office.enqueue(task))
        assert row.state == "failed"
        assert row.error.startswith(type(error).__name__)
        assert len(row.error) <= coord.worker.failure.MAX_LINE
        assert "raise error" in row.traceback[-coord.worker.failure.MAX_TRACEBACK :] or len(str(row.traceback)) > 10_000
        await office.nothing_left_in_redis()
        assert worker.lives


@pytest.mark.parametrize(
    "group",
    [
        ExceptionGroup("several", [ValueError("one"), KeyError("two")]),
        BaseExceptionGroup("several", [ValueError("one"), asyncio.CancelledError()]),
    ],
)
async def test_a_group_of_exceptions_is_one_failure(office: Office, group: BaseException) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        raise group

    async with working(office, [task]) as worker:
        row = await office.final(await office.enqueue(task))
        await office.nothing_left_in_redis()
        assert worker.lives
    assert row.state == "failed"
    assert "ValueError: one" in row.traceback


async def test_a_task_that_awaits_what_was_cancelled_has_failed(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        raise asyncio.CancelledError

    async with working(office, [task]):
        row = await office.final(await office.enqueue(task))
    assert (row.state, row.error) == ("failed", "RuntimeError: the task has cancelled itself")


def _result(kind: str) -> Any:
    return {"nothing": None, "JSON": {"a": [1, 2.5, None]}, "no JSON": object(), "changed by JSON": (1, 2)}[kind]


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("kind", ["nothing", "JSON", "no JSON", "changed by JSON"])
async def test_what_a_task_returns_is_kept_if_it_is_json(office: Office, kind: str, applied: bool) -> None:
    async def task(ctx: dict[str, Any]) -> Any:
        if applied:
            async with job_transaction(ctx) as session:
                await apply(session, ctx)
        return _result(kind)

    async with working(office, [task]) as worker:
        job = await office.enqueue(task)
        await office.final(job)
        await eventually(lambda: not len(worker.running))
    row = await office.row(job)
    assert (row.state, row.result) == ("done", _result(kind) if kind == "JSON" else None)


@pytest.mark.parametrize("error", ["statement", "transient", "commit", "swallowed flush"])
async def test_a_task_that_returns_although_its_block_did_not_commit_has_failed(office: Office, error: str) -> None:
    """Lost effects are not done, whatever the task catches; what passes by itself is tried again."""

    async def task(ctx: dict[str, Any]) -> None:
        try:
            async with job_transaction(ctx) as session:
                await apply(session, ctx)
                if error == "transient" and ctx["job_try"] == 1:
                    raise ConnectionResetError("lost")
                if error == "statement":
                    await session.execute(text("SELECT 1 / 0"))
                if error == "commit":
                    await session.execute(text("CREATE TEMPORARY TABLE t (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
                    await session.execute(text("INSERT INTO t VALUES (1), (1)"))
                if error == "swallowed flush":
                    session.add_all([User(id=1), User(id=1)])
                    with contextlib.suppress(Exception):
                        await session.flush()
        except Exception:
            logging.getLogger(__name__).debug("whatever", exc_info=True)

    async with working(office, [task]):
        job = await office.enqueue(task)
        row = await office.final(job)
    if error == "transient":
        assert (row.state, row.attempt, await office.effects(job)) == ("done", 2, [2])
    else:
        assert (row.state, await office.effects(job)) == ("failed", [])
        assert row.error
        assert row.traceback


@pytest.mark.parametrize("arguments", [((), {"other": 1}), ((1, 2), {}), ((), {})], ids=["name", "many", "few"])
async def test_arguments_that_a_tasks_version_refuses_go_back_until_one_takes_them(
    office: Office, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def old(ctx: dict[str, Any], name: str) -> None:
        raise AssertionError("it cannot be called so")

    async def new(ctx: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Takes anything."""

    args, kwargs = arguments
    async with working(office, [func(old, name="task")]):
        job = await office.enqueue("task", *args, **kwargs)

        async def was_refused() -> bool:
            return bool((await office.row(job)).unknown_seconds > 0)

        await eventually(was_refused)
        row = await office.row(job)
        assert (row.state, row.attempt) == ("queued", 1)
        assert "does not take these arguments" in row.error
        async with working(office, [func(new, name="task")]):
            assert (await office.final(job, within=20)).attempt == 1
    assert "does not take these arguments" in caplog.text


class Turns:
    """A task that does something else each time."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = [*errors]
        self.began: list[float] = []
        self.tries: list[int] = []

    async def __call__(self, ctx: dict[str, Any]) -> None:
        self.began.append(time.monotonic())
        self.tries.append(ctx["job_try"])
        async with job_transaction(ctx) as session:
            await apply(session, ctx)
            if (error := self.errors.pop(0)) is not None:
                raise error

    @property
    def pauses(self) -> list[float]:
        return [after - before for before, after in zip(self.began, self.began[1:], strict=False)]


def named(turns: Turns, **options: Any) -> Any:
    async def task(ctx: dict[str, Any]) -> None:
        await turns(ctx)

    return func(task, name="task", **options)


def passing() -> list[BaseException]:
    """Failures that pass by themselves."""
    return [
        LockTimeoutError("locked"),
        asyncpg.DeadlockDetectedError("deadlock"),
        asyncpg.SerializationError("serialization"),
        ConnectionResetError("lost"),
        ExceptionGroup("lost", [ConnectionResetError("lost"), asyncpg.DeadlockDetectedError("deadlock")]),
    ]


async def test_what_passes_by_itself_is_tried_again_and_each_attempt_counted(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.worker.failure, "PAUSE_SECONDS", (0.02, 30.0))
    turns = Turns(*passing(), None)
    async with working(office, [named(turns)]):
        job = await office.enqueue("task")
        row = await office.final(job)
        await office.nothing_left_in_redis()
    attempts = len(passing()) + 1
    assert (row.state, row.attempt, turns.tries) == ("done", attempts, [*range(1, attempts + 1)])
    assert {type(number) for number in turns.tries} == {int}, "what redis-py makes of a count is not what arq reads"
    assert row.error.startswith("ExceptionGroup: lost")
    assert await office.effects(job) == [attempts]
    limits = [coord.worker.failure.PAUSE_SECONDS[0] * 2**number for number in range(len(turns.pauses))]
    assert all(limit / 2 <= pause < limit + 5 for limit, pause in zip(limits, turns.pauses, strict=True)), turns.pauses


def test_the_pause_grows_to_its_limit_and_is_never_the_same_for_all() -> None:
    shortest, longest = coord.worker.failure.PAUSE_SECONDS
    assert {backoff(1) for _ in range(50)} != {backoff(1)}
    assert all(shortest / 2 <= backoff(1) <= shortest for _ in range(50))
    assert all(longest / 2 <= backoff(attempt) <= longest for attempt in (20, 1_000, 10**6))


@pytest.mark.parametrize("given", ["job", "function", "worker"])
async def test_the_last_attempt_that_fails_is_the_end(office: Office, given: str) -> None:
    """The job says how many there are, else its function, else the worker."""
    limits = {"job": 5, "function": 5, "worker": 5, given: 2}
    if given == "worker":
        limits["function"] = None  # type: ignore[assignment]
    turns = Turns(*[ConnectionResetError("lost")] * 5)
    async with working(office, [named(turns, max_tries=limits["function"])], max_tries=limits["worker"]):
        row = await office.final(await office.enqueue(task_options("task", max_attempts=2 if given == "job" else None)))
        await office.nothing_left_in_redis()
    assert (row.state, row.attempt, turns.tries) == ("failed", 2, [1, 2])
    assert row.error == "ConnectionResetError: lost (attempt 2 of 2)"
    assert "raise error" in row.traceback


@pytest.mark.parametrize("error", [Retry(), RetryJob()])
async def test_arqs_retry_is_another_attempt_at_once(
    office: Office, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    turns = Turns(error, error, None)
    async with working(office, [named(turns)]), working(office, [named(turns)]):
        job = await office.enqueue("task")
        row = await office.final(job)
        await office.nothing_left_in_redis()
    assert (row.state, row.attempt, turns.tries) == ("done", 3, [1, 2, 3])
    assert await office.effects(job) == [3]
    assert max(turns.pauses) < 5
    assert "not to be found in Redis" not in caplog.text, "it was handed over, and not found by the reconciler"


async def test_arqs_retry_waits_as_long_as_it_says(office: Office) -> None:
    turns = Turns(Retry(defer=0.4), None)
    async with working(office, [named(turns)]):
        await office.final(await office.enqueue("task"))
    assert 0.4 <= turns.pauses[0] < 5


@pytest.mark.parametrize("defer", [10**13, 10**400], ids=["after all of PostgreSQL's times", "after all numbers"])
async def test_arqs_retry_may_be_for_longer_than_there_are_times(office: Office, defer: int) -> None:
    """What cannot be written would be tried for ever, and its slot never be free again."""
    turns = Turns(Retry(defer=defer), None)
    async with working(office, [named(turns)], max_jobs=1):
        job = await office.enqueue("task")

        async def is_put_off() -> bool:
            return bool((await office.row(job)).attempt == 2)

        await eventually(is_put_off)
        assert (await office.row(job)).scheduled_at > datetime.now(UTC) + timedelta(days=36_000)
        assert (await office.final(await office.enqueue("task"))).state == "done"


async def test_arqs_retry_comes_to_an_end_too(office: Office) -> None:
    turns = Turns(*[Retry()] * 5)
    async with working(office, [named(turns)]):
        row = await office.final(await office.enqueue(task_options("task", max_attempts=2)))
        await office.nothing_left_in_redis()
    assert (row.state, turns.tries) == ("failed", [1, 2])


async def test_a_wait_for_a_connection_uses_up_no_attempt(
    office: Office, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool of two, and ten jobs at a time that each hold one for longer than it waits; said at start."""
    monkeypatch.setattr(coord.worker.failure, "PAUSE_SECONDS", (0.05, 0.2))
    small = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0.1}

    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await apply(session, ctx)
            await asyncio.sleep(0.2)

    async with working(office, [task], engine=small, max_jobs=10, max_tries=1):
        jobs = [await office.enqueue(task) for _ in range(10)]
        rows = [await office.final(job, within=60) for job in jobs]
    assert [(row.state, row.attempt - row.uncounted) for row in rows] == [("done", 1)] * 10
    assert max(row.attempt for row in rows) > 1, "nobody had to wait for a connection"
    assert "keeps 2 connections for 10 jobs at a time, which will wait for them: pool_size=12" in caplog.text


async def test_a_task_that_enqueues_its_own_key_makes_the_next_job(office: Office) -> None:
    """A chain: the one that runs is as good as done when it enqueues with its effect."""
    ran: list[int] = []

    async def task(ctx: dict[str, Any], number: int) -> None:
        ran.append(number)
        async with job_transaction(ctx) as session:
            if number < 3:
                following = await enqueue(session, task_options("task", unique_key="chain"), number + 1)
                assert not following.joined

    async with working(office, [func(task, name="task")]):
        await office.enqueue(task_options("task", unique_key="chain"), 1)
        await eventually(lambda: ran == [1, 2, 3])


@pytest.mark.parametrize("error", [ValueError("late"), Retry(), RetryJob(), ConnectionResetError("late"), SystemExit()])
async def test_a_failure_after_the_effect_was_applied_changes_nothing(
    office: Office, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_try"])
        async with job_transaction(ctx) as session:
            await apply(session, ctx)
        raise error

    async with working(office, [task]) as worker:
        job = await office.enqueue(task)
        assert (await office.final(job)).state == "done"
        await office.nothing_left_in_redis()
        assert worker.lives
    assert ran == [1]
    assert await office.effects(job) == [1]
    assert any("failed after its effect was applied" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("given", ["job", "function", "worker"])
async def test_a_timeout_is_told_apart_from_other_ends(office: Office, given: str) -> None:
    """The job says how long it may take, else its function, else the worker."""
    limits: dict[str, float | None] = {"job": 60, "function": 60, "worker": 60, given: 1.0}
    if given != "job":
        limits["job"] = None
    if given == "worker":
        limits["function"] = None

    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await apply(session, ctx)
            await asyncio.sleep(30)

    async with working(office, [func(task, name="task", timeout=limits["function"])], job_timeout=limits["worker"]):
        job = await office.enqueue(task_options("task", timeout=limits["job"]))
        row = await office.final(job)
        await office.nothing_left_in_redis()
    assert (row.state, row.error) == ("failed", "AttemptTimeoutError: the attempt took longer than 1 s")
    assert "asyncio.sleep(30)" in row.traceback
    assert await office.effects(job) == []


async def test_a_timeout_of_the_tasks_own_is_its_failure(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(30)

    async with working(office, [task]):
        row = await office.final(await office.enqueue(task))
    assert (row.state, row.error) == ("failed", "TimeoutError")


async def cancelled(office: Office, job: Job) -> None:
    async with office.session_maker() as session:
        await cancel_job(session, job.id)
        await session.commit()


@pytest.mark.parametrize("kind", ["transaction", "plain", "stubborn"])
async def test_a_running_job_that_is_cancelled_ends_at_once_and_rolls_back(office: Office, kind: str) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        try:
            if kind != "plain":
                async with job_transaction(ctx) as session:
                    await apply(session, ctx)
                    begun.set()
                    await asyncio.Event().wait()
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ended.set()
            if kind == "stubborn":
                raise ValueError("something else") from error
            raise

    async with working(office, [task]) as worker:
        job = await office.enqueue(task)
        await begun.wait()
        await cancelled(office, job)
        row = await office.final(job, within=2)
        await asyncio.wait_for(ended.wait(), 2)
        await eventually(lambda: not len(worker.running))
        await office.nothing_left_in_redis()
        assert worker.lives
    assert (row.state, row.attempt) == ("cancelled", 1)
    assert await office.effects(job) == []


async def test_a_job_cancelled_after_its_effect_was_applied_is_done(office: Office) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx) as session:
            await apply(session, ctx)
        begun.set()
        await go.wait()

    async with working(office, [task]):
        job = await office.enqueue(task)
        await begun.wait()
        await cancelled(office, job)
        go.set()
        assert (await office.final(job)).state == "done"
        await office.nothing_left_in_redis()


async def redelivered(office: Office, job: Job) -> None:
    """By somebody who does not know that it was delivered before."""
    async with office.redis.pipeline(transaction=True) as pipe:
        given(pipe, job)
        await pipe.execute()


async def test_every_job_delivered_twice_applies_its_effect_once(office: Office) -> None:
    """To another worker while the first one runs it, and to the first one again."""
    ran: list[str] = []
    go = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])
        await go.wait()
        async with job_transaction(ctx) as session:
            await apply(session, ctx)

    tasks = [func(task, name="task")]
    async with working(office, tasks, max_jobs=20) as one:
        jobs = [await office.enqueue("task") for _ in range(20)]
        await eventually(lambda: len(ran) == 20)
        async with working(office, tasks, max_jobs=20) as two:
            for job in jobs:
                await redelivered(office, job)
            await eventually(lambda: len(ran) == 40)
            for job in jobs:
                await redelivered(office, job)
            go.set()
            for job in jobs:
                assert (await office.final(job)).state == "done"
            await eventually(lambda: not len(one.running) and not len(two.running))
            await office.nothing_left_in_redis()
    assert [await office.effects(job) for job in jobs] == [[1]] * 20


async def test_a_job_that_runs_elsewhere_is_not_begun_again_for_an_old_message(office: Office) -> None:
    """As an old file of Redis' would bring back."""
    ran: list[str] = []
    go = asyncio.Event()

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])
        await go.wait()

    async def other(ctx: dict[str, Any]) -> None:
        """Shows that the queue goes on."""

    tasks = [func(task, name="task"), func(other, name="other")]
    async with working(office, tasks, max_jobs=1):
        job = await office.enqueue("task")
        await eventually(lambda: ran)

        async def is_named() -> bool:
            return any(str(job.id) in row.jobs for row in await office.workers())

        await eventually(is_named)
        async with working(office, tasks) as second:
            lifecycle = second.worker.ctx["coord.lifecycle"]
            await eventually(lambda: (job.id, 1) in lifecycle.registry.held_elsewhere)
            await office.put(Message.of(job).text(), score=100 * RANK_SHIFT + 1)
            await office.waiting(0)
            for _ in range(3):
                await office.final(await office.enqueue("other"))
            go.set()
            assert (await office.final(job)).state == "done"
            await office.put(Message.of(job).text(), score=100 * RANK_SHIFT + 1)
            await office.waiting(0)
            await office.final(await office.enqueue("other"))
    assert ran == [str(job.id)]


async def test_a_job_delivered_again_after_its_end_applies_nothing(office: Office) -> None:
    ran: list[int] = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_try"])
        async with job_transaction(ctx) as session:
            await apply(session, ctx)

    async with working(office, [task]) as worker:
        job = await office.enqueue(task)
        before = await office.final(job)
        await office.nothing_left_in_redis()
        await redelivered(office, job)
        await eventually(lambda: len(ran) == 2)
        await eventually(lambda: not len(worker.running))
        await office.nothing_left_in_redis()
        assert await office.row(job) == before
    assert await office.effects(job) == [1]


@pytest.mark.parametrize("hook", ["on_job_start", "on_job_end", "after_job_end"])
@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
async def test_a_hook_that_raises_ends_neither_the_job_nor_the_worker(
    office: Office, hook: str, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """Also one that awaits what was cancelled."""
    called = []

    async def bad(ctx: dict[str, Any]) -> None:
        called.append(ctx["job_id"])
        raise error("the hook's own")

    async def task(ctx: dict[str, Any]) -> None:
        """Nothing."""

    options: dict[str, Any] = {hook: bad}
    async with working(office, [task], **options) as worker:
        for _ in range(2):
            job = await office.enqueue(task)
            assert (await office.final(job)).state == "done"
            await eventually(lambda job=job: str(job.id) in called)
        await office.nothing_left_in_redis()
        assert worker.lives
    assert "the hook's own" in caplog.text


@pytest.mark.parametrize("hook", ["on_job_end", "after_job_end"])
async def test_a_job_that_is_cancelled_has_its_end_although_a_hook_awaits_what_was_cancelled(
    office: Office, hook: str
) -> None:
    begun = asyncio.Event()

    async def bad(ctx: dict[str, Any]) -> None:
        raise asyncio.CancelledError

    async def task(ctx: dict[str, Any]) -> None:
        begun.set()
        await asyncio.sleep(60)

    options: dict[str, Any] = {hook: bad}
    async with working(office, [task], **options) as worker:
        job = await office.enqueue(task)
        await asyncio.wait_for(begun.wait(), 10)
        worker.running.cancel(job.id, 1)
        assert (await office.final(job)).state == "cancelled"
        await eventually(lambda: not len(worker.running))


async def test_hooks_are_called_with_the_tasks_context_in_order(office: Office) -> None:
    order: list[str] = []

    async def hook(ctx: dict[str, Any]) -> None:
        ctx["from the hook"] = "seen"
        order.append("start")

    async def task(ctx: dict[str, Any]) -> None:
        order.append(ctx["from the hook"])

    async def end(ctx: dict[str, Any]) -> None:
        order.append(f"end {ctx['from the hook']}")

    async def after(ctx: dict[str, Any]) -> None:
        order.append("after")

    async with working(office, [task], on_job_start=hook, on_job_end=end, after_job_end=after):
        await office.final(await office.enqueue(task))
        await eventually(lambda: "after" in order)
    assert order == ["start", "seen", "end seen", "after"]


@pytest.fixture(scope="module")
def fragile() -> Iterator[PostgreSQL]:
    with fragile_postgresql() as server:
        yield server


@pytest.mark.slow
async def test_jobs_get_over_a_crash_of_postgresql_wherever_they_are(fragile: PostgreSQL, redis_url: str) -> None:
    """Before their transaction, in it, holding a table's lock, waiting for one, or still in the queue."""
    go = asyncio.Event()
    there: set[str] = set()

    async def task(ctx: dict[str, Any], place: str) -> None:
        if ctx["job_try"] == 1 and place == "before":
            there.add(place)
            await go.wait()
        async with job_transaction(ctx) as session:
            await apply(session, ctx)
            if ctx["job_try"] == 1 and place == "in it":
                there.add(place)
                await go.wait()
            async with lock_tables(session, [User], timeout=30):
                if ctx["job_try"] == 1 and place == "locking":
                    there.add(place)
                    await go.wait()

    async with prepared(fragile, redis_url) as office, working(office, [func(task, name="task")], max_jobs=4) as worker:
        places = ["before", "in it", "locking", "waiting", "queued"]
        jobs = [await office.enqueue("task", place) for place in places]
        await eventually(lambda: there == {"before", "in it", "locking"} and len(worker.running) == 4)
        await asyncio.to_thread(fragile.restart, "immediate")
        go.set()
        async with opened(fragile.url, redis_url) as after:
            rows = [await after.final(job, within=20) for job in jobs]
            assert [row.state for row in rows] == ["done"] * 5
            assert all(row.attempt <= 3 for row in rows), [row.attempt for row in rows]
            assert [len(await after.effects(job)) for job in jobs] == [1] * 5
            await after.nothing_left_in_redis()
        assert worker.lives
