"""Waits that depend on a job: they end with it, the moment it is known, and with the row as the job has left it."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from coord import (
    Coordinator,
    Job,
    JobCancelledError,
    JobFailedError,
    JobState,
    RowNotFoundError,
    TooManyWaitersError,
    UncommittedChangesError,
    WaitTimeoutError,
    cancel_job,
    enqueue,
    job_transaction,
    retry_job,
    wait_for_row_change,
    watch_row,
)
from coord.notify.subscriber import Subscriber
from coord.waiting.reader import Reader
from coord.waiting.watcher import Watcher
from tests.ledger import a_task, committed, delivered, executed
from tests.models import User
from tests.serving import all_given_back, eventually
from tests.waits import registered, waiters, waiting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger", "nobody_left_waiting")

NEVER = 60.0
"""An interval that no test lives to see."""


class Base(DeclarativeBase):
    pass


class NamedUser(Base):
    __tablename__ = "named_users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


async def end(observer: Connection, state: str, error: str | None = None) -> None:
    await observer.execute("UPDATE coord_jobs SET state = $1, error = $2", state, error)


class Held:
    """Reads of one mapped class, kept between PostgreSQL's answer and their waiters as long as somebody likes."""

    def __init__(self, patch: pytest.MonkeyPatch, model: type, kind: str) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.under_way = 0
        read = getattr(Reader, kind)

        async def held(reader: Reader, *arguments: Any) -> Any:
            found = await read(reader, *arguments)
            if reader.mapper.class_ is model:
                self.under_way += 1
                await self.free.wait()
                self.under_way -= 1
            return found

        patch.setattr(Reader, kind, held)


# Its end ends the wait


@pytest.mark.parametrize("kind", ["job", "id"])
@pytest.mark.parametrize("until", [None, lambda _: False])
@pytest.mark.usefixtures("read_settings")
async def test_a_job_that_is_done_ends_the_wait_though_nothing_has_changed(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job, kind: str, until: Any
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job if kind == "job" else job.id, until=until)
        await registered()
        began = time.monotonic()
        await end(observer, "done")
        row = await task
        assert time.monotonic() - began < 1
        assert row.name == "before"
        assert row in session


@pytest.mark.parametrize("state", ["done", "failed", "queued"])
@pytest.mark.usefixtures("read_settings")
async def test_a_wait_that_has_ended_holds_its_session_no_longer(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job, state: str, reference_counts_alone: None
) -> None:
    """A busy process would have hundreds of sessions, each with its rows, between two garbage collections."""

    async def wait() -> weakref.ref[AsyncSession]:
        async with session_maker() as session:
            with suppress(JobFailedError, WaitTimeoutError):
                await wait_for_row_change(session, User, user, job=job, timeout=0.1 if state == "queued" else 10)
            return weakref.ref(session)

    task = asyncio.create_task(wait())
    await registered()
    await end(observer, state)
    session = await task
    await eventually(lambda: session() is None)


async def test_a_wait_that_its_bell_has_ended_holds_its_session_no_longer(
    session_maker: SessionMaker, redis_url: str, user: int, reference_counts_alone: None
) -> None:
    async def wait(job: Job) -> weakref.ref[AsyncSession]:
        async with session_maker() as session:
            await wait_for_row_change(session, User, user, job=job, interval=NEVER, timeout=10)
            return weakref.ref(session)

    async with Coordinator(session_maker, redis=redis_url):
        job = await committed(session_maker, a_task)
        task = asyncio.create_task(wait(job))
        await registered()
        async with job_transaction(delivered(job, session_maker)) as effect:
            (await effect.get_one(User, user)).name = "after"
        session = await task
        await eventually(lambda: session() is None)


@pytest.fixture
def reference_counts_alone() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("columns", [["name"], ["id"]])
@pytest.mark.usefixtures("read_settings")
async def test_the_row_is_as_the_job_has_left_it(
    session_maker: SessionMaker, user: int, job: Job, columns: list[str]
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, columns=columns)
        await registered()
        async with job_transaction(delivered(job, session_maker)) as working:
            (await working.get_one(User, user)).name = "after"
        assert (await task).name == "after"


@pytest.mark.usefixtures("read_settings")
async def test_a_job_that_fails_is_raised_with_its_reason_in_one_line(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job)
        await registered()
        await end(observer, "failed", "KeyError: 'sku'")
        with pytest.raises(JobFailedError) as caught:
            await task
        assert (caught.value.job_id, caught.value.reason) == (job.id, "KeyError: 'sku'")
        assert str(caught.value) == f"Job {job.id} failed: KeyError: 'sku'"
        assert not caught.value.retryable


@pytest.mark.usefixtures("read_settings")
async def test_a_reason_of_several_lines_is_told_in_one(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job
) -> None:
    """Whoever has written it into the ledger."""
    for error, reason in (("ValueError: a\n  b\r\nc", "ValueError: a b c"), (None, "no reason was recorded")):
        await end(observer, "failed", error)
        async with session_maker() as session:
            with pytest.raises(JobFailedError) as caught:
                await wait_for_row_change(session, User, user, job=job)
            assert caught.value.reason == reason


@pytest.mark.usefixtures("read_settings")
async def test_a_job_that_is_cancelled_is_raised(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job
) -> None:
    async with session_maker() as session, session_maker() as other:
        task = waiting(session, User, user, job=job)
        await registered()
        await cancel_job(other, job.id)
        await other.commit()
        with pytest.raises(JobCancelledError) as caught:
            await task
        assert caught.value.job_id == job.id


@pytest.mark.parametrize("until", [None, lambda _: False])
@pytest.mark.usefixtures("read_settings")
async def test_a_job_that_has_ended_before_the_call_ends_it_at_once(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job, until: Any
) -> None:
    async with session_maker() as session:
        options = {"job": job, "until": until, "interval": NEVER, "timeout": 5}
        await end(observer, "done")
        assert (await wait_for_row_change(session, User, user, **options)).name == "before"
        await end(observer, "failed")
        with pytest.raises(JobFailedError):
            await wait_for_row_change(session, User, user, **options)
        await end(observer, "cancelled")
        with pytest.raises(JobCancelledError):
            await wait_for_row_change(session, User, user, **options)


@pytest.mark.usefixtures("read_settings")
async def test_a_change_of_the_row_ends_the_wait_before_the_job_does(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job)
        await registered()
        await observer.execute("UPDATE users SET name = 'after'")
        assert (await task).name == "after"


@pytest.mark.parametrize("first", ["change", "failure"])
@pytest.mark.parametrize("read_settings", [{}], indirect=True)
@pytest.mark.usefixtures("read_settings")
async def test_of_a_change_and_a_failure_the_one_that_is_known_first_ends_the_wait(
    session_maker: SessionMaker, observer: Connection, monkeypatch: pytest.MonkeyPatch, user: int, job: Job, first: str
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job)
        await registered()
        held = Held(monkeypatch, Job if first == "change" else User, "columns")
        held.free.clear()
        await eventually(lambda: held.under_way)
        await observer.execute("UPDATE users SET name = 'half'")
        await end(observer, "failed")
        if first == "change":
            assert (await task).name == "half"
        else:
            with pytest.raises(JobFailedError):
                await task
        held.free.set()


@pytest.mark.usefixtures("read_settings")
async def test_a_failure_ends_a_wait_whose_changes_were_not_the_ones(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job
) -> None:
    seen: list[str] = []

    def another(row: User) -> bool:
        seen.append(row.name)
        return False

    async with session_maker() as session:
        task = waiting(session, User, user, job=job, until=another)
        await registered()
        await observer.execute("UPDATE users SET name = 'half'")
        await eventually(lambda: "half" in seen)
        await end(observer, "failed")
        with pytest.raises(JobFailedError):
            await task


@pytest.mark.usefixtures("read_settings")
async def test_an_unfinished_job_leaves_the_wait_its_deadline(session_maker: SessionMaker, user: int, job: Job) -> None:
    async with session_maker() as session:
        began = time.monotonic()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, user, job=job, timeout=0.2)
        assert 0.2 <= time.monotonic() - began < 1.2


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
@pytest.mark.usefixtures("read_settings")
async def test_a_job_that_has_ended_by_the_deadline_is_known_by_the_deadline(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job, state: str
) -> None:
    """An interval of a minute never comes; the last look does, and it is at the job as well.

    The first look may come after the end, and answers at once.
    """
    async with session_maker() as session:
        began = time.monotonic()
        task = waiting(session, User, user, job=job, interval=NEVER, timeout=0.5)
        await registered()
        await end(observer, state)
        if state == "done":
            assert (await task).name == "before"
        else:
            with pytest.raises((JobFailedError, JobCancelledError)):
                await task
        assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("state", ["done", "failed"])
@pytest.mark.usefixtures("read_settings")
async def test_a_job_is_looked_at_by_the_deadline_also_if_the_row_has_changed_and_until_is_false_of_it(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job, state: str
) -> None:
    async with session_maker() as session:
        began = time.monotonic()
        task = waiting(session, User, user, job=job, until=lambda _: False, interval=NEVER, timeout=0.5)
        await registered()
        await observer.execute("UPDATE users SET name = 'after'")
        await end(observer, state)
        if state == "done":
            assert (await task).name == "after"
        else:
            with pytest.raises(JobFailedError):
                await task
        assert time.monotonic() - began < 1.5


@pytest.mark.usefixtures("read_settings")
async def test_an_unfinished_job_leaves_the_deadline_to_a_wait_whose_change_was_not_the_one(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job
) -> None:
    async with session_maker() as session:
        began = time.monotonic()
        task = waiting(session, User, user, job=job, until=lambda _: False, interval=NEVER, timeout=0.5)
        await registered()
        await observer.execute("UPDATE users SET name = 'half'")
        with pytest.raises(WaitTimeoutError):
            await task
        assert 0.5 <= time.monotonic() - began < 1.2


# What is no job


@pytest.mark.usefixtures("read_settings")
async def test_a_job_that_the_ledger_does_not_have_is_not_found(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job
) -> None:
    unknown = uuid4()
    async with session_maker() as session:
        with pytest.raises(RowNotFoundError, match=str(unknown)):
            await wait_for_row_change(session, User, user, job=unknown, interval=NEVER, timeout=5)
        task = waiting(session, User, user, job=job)
        await registered()
        await observer.execute("DELETE FROM coord_jobs")
        with pytest.raises(RowNotFoundError, match=str(job.id)):
            await task


@pytest.mark.parametrize("nonsense", ["x", 5, b"", str(UUID(int=7)), object(), User(id=1), Job, True])
@pytest.mark.usefixtures("read_settings")
async def test_what_is_neither_a_job_nor_an_id_is_refused(
    session_maker: SessionMaker, user: int, nonsense: Any
) -> None:
    async with session_maker() as session:
        with pytest.raises(ValueError, match="job is what enqueue returned"):
            await wait_for_row_change(session, User, user, job=nonsense, timeout=5)


@pytest.mark.usefixtures("read_settings")
async def test_the_job_has_to_be_committed_first(session_maker: SessionMaker, user: int) -> None:
    async with session_maker() as session:
        job = await enqueue(session, a_task)
        with pytest.raises(UncommittedChangesError, match="Commit first"):
            await wait_for_row_change(session, User, user, job=job)
        await session.commit()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, user, job=job, timeout=0)


@pytest.mark.usefixtures("read_settings")
async def test_a_row_that_is_not_there_is_not_found_whatever_the_job(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    async with session_maker() as session:
        with pytest.raises(RowNotFoundError, match=r"User\(2\)"):
            await wait_for_row_change(session, User, 2, job=job, timeout=5)


# Reads that began too early


async def known_to_have_ended() -> None:
    """Return when a wait that is under way has been told that its job is done."""

    await eventually(lambda: any(waiter.concluding for waiter in waiters()))


@pytest.mark.parametrize("kind", ["columns", "entities"])
@pytest.mark.parametrize("read_settings", [{}], indirect=True)
@pytest.mark.usefixtures("read_settings")
async def test_a_read_that_began_before_the_jobs_commit_is_not_its_last_word(
    session_maker: SessionMaker, observer: Connection, monkeypatch: pytest.MonkeyPatch, user: int, job: Job, kind: str
) -> None:
    """Nor if what it found was news: the entity is read when a column has changed."""
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, until=lambda row: row.name == "nothing like it")
        await registered()
        held = Held(monkeypatch, User, kind)
        held.free.clear()
        if kind == "entities":
            await observer.execute("UPDATE users SET name = 'half'")
        await eventually(lambda: held.under_way)
        async with job_transaction(delivered(job, session_maker)) as working:
            (await working.get_one(User, user)).name = "final"
        await known_to_have_ended()
        held.free.set()
        assert (await task).name == "final"


@pytest.mark.parametrize("read_settings", [{}], indirect=True)
@pytest.mark.usefixtures("read_settings")
async def test_a_first_read_that_began_before_the_jobs_commit_is_not_its_last_word(
    session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch, user: int, job: Job
) -> None:
    """It is of a whole row, which is wanted whether or not it differs, as the last one is."""
    held = Held(monkeypatch, User, "entities")
    held.free.clear()
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, until=lambda row: row.name == "nothing like it")
        await eventually(lambda: held.under_way)
        async with job_transaction(delivered(job, session_maker)) as working:
            (await working.get_one(User, user)).name = "final"
        await known_to_have_ended()
        held.free.set()
        assert (await task).name == "final"


@pytest.mark.parametrize("read_settings", [{}], indirect=True)
@pytest.mark.usefixtures("read_settings")
async def test_a_last_read_that_fails_is_made_again(
    session_maker: SessionMaker, observer: Connection, monkeypatch: pytest.MonkeyPatch, user: int, job: Job
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, interval=0.1)
        await registered()
        held = Held(monkeypatch, User, "columns")
        held.free.clear()
        await eventually(lambda: held.under_way)
        await observer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await end(observer, "done")
        held.free.set()
        assert (await task).name == "before"


@pytest.mark.parametrize("with_job", [True, False])
@pytest.mark.parametrize("read_settings", [{}], indirect=True)
@pytest.mark.usefixtures("read_settings")
async def test_a_read_that_was_under_way_at_the_deadline_is_not_the_last_look(
    session_maker: SessionMaker,
    observer: Connection,
    monkeypatch: pytest.MonkeyPatch,
    user: int,
    job: Job,
    with_job: bool,
) -> None:
    """Nor if what it has found is news of which `until` is false."""
    async with session_maker() as session:
        until, linked = (lambda row: row.name == "final"), job if with_job else None
        task = waiting(session, User, user, job=linked, until=until, timeout=0.5)
        await registered()
        held = Held(monkeypatch, User, "entities")
        held.free.clear()
        await observer.execute("UPDATE users SET name = 'half'")
        await eventually(lambda: held.under_way)
        await observer.execute("UPDATE users SET name = 'final'")
        await eventually(lambda: any(waiter.last for waiter in waiters()))
        held.free.set()
        assert (await task).name == "final"


@pytest.mark.parametrize("read_settings", [{}], indirect=True)
@pytest.mark.usefixtures("read_settings")
async def test_a_look_at_the_job_is_not_the_last_word_while_the_last_look_at_the_row_is_under_way(
    session_maker: SessionMaker, observer: Connection, monkeypatch: pytest.MonkeyPatch, user: int, job: Job
) -> None:
    """The row's last look begins before the wait has judged the one before it."""
    gates = [asyncio.Event(), asyncio.Event()]
    reads = {User: 0, Job: 0}

    def counted(kind: str) -> None:
        read = getattr(Reader, kind)

        async def counting(reader: Reader, *arguments: Any) -> Any:
            found = await read(reader, *arguments)
            model = reader.mapper.class_
            reads[model] += model is Job or kind == "entities"
            if model is User and kind == "entities":
                await gates[min(reads[User], 2) - 1].wait()
            return found

        monkeypatch.setattr(Reader, kind, counting)

    async with session_maker() as session:
        task = waiting(session, User, user, job=job, until=lambda row: row.name == "final", timeout=0.5)
        await registered()
        counted("entities")
        counted("columns")
        await observer.execute("UPDATE users SET name = 'half'")
        await eventually(lambda: reads[User] == 1)
        await eventually(lambda: any(waiter.last for waiter in waiters()))
        await observer.execute("UPDATE users SET name = 'final'")
        gates[0].set()
        await eventually(lambda: reads[User] == 2)
        seen = reads[Job]
        await eventually(lambda: reads[Job] > seen + 1 or task.done())
        gates[1].set()
        assert (await task).name == "final"


# How many they are


async def test_a_wait_for_a_job_counts_as_one(session_maker: SessionMaker, user: int, job: Job) -> None:
    async with Coordinator(session_maker, max_waiters=2), AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(session_maker()) for _ in range(3)]
        tasks = [waiting(session, User, user, job=job, timeout=0.5) for session in sessions[:2]]
        await registered()
        with pytest.raises(TooManyWaitersError):
            await wait_for_row_change(sessions[2], User, user, job=job)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, WaitTimeoutError)


@pytest.mark.parametrize("read_settings", [{}], indirect=True)
@pytest.mark.usefixtures("read_settings")
async def test_a_thousand_waits_for_their_jobs_share_their_reads(
    engine: AsyncEngine, session_maker: SessionMaker, observer: Connection
) -> None:
    await observer.execute("INSERT INTO users SELECT n, 'before' FROM generate_series(1, 1000) AS n")
    async with session_maker() as session:
        made = [await enqueue(session, a_task, n) for n in range(1, 1001)]
        await session.commit()
    sessions = [session_maker() for _ in made]
    tasks = [
        waiting(session, User, n, job=job) for n, (session, job) in enumerate(zip(sessions, made, strict=True), start=1)
    ]
    await registered()
    with executed(engine) as reads:
        await end(observer, "done")
        assert {row.name for row in await asyncio.gather(*tasks)} == {"before"}
    assert 1 < len(reads) < 50
    await all_given_back(engine)
    for session in sessions:
        await session.close()


@pytest.mark.parametrize("how", ["cancelled", "until raises"])
@pytest.mark.usefixtures("read_settings")
async def test_a_wait_that_is_left_leaves_nothing(
    session_maker: SessionMaker, engine: AsyncEngine, user: int, job: Job, how: str
) -> None:
    """As `nobody_left_waiting` sees."""
    async with session_maker() as session:
        if how == "cancelled":
            task = waiting(session, User, user, job=job)
            await registered()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with pytest.raises(ZeroDivisionError):
                await wait_for_row_change(session, User, user, job=job, until=lambda row: row.id / 0 > 1)
    await all_given_back(engine)


# The bell


@pytest.fixture
def late_subscription(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set it, and the process subscribes; by all it knows, jobs are still to be handed over as waits begin."""
    subscribe, subscribes = Subscriber._subscribe, asyncio.Event()

    async def late(self: Subscriber, connection: Any) -> None:
        await subscribes.wait()
        await subscribe(self, connection)

    monkeypatch.setattr(Subscriber, "_subscribe", late)
    monkeypatch.setattr(Watcher, "is_job_pending", lambda *_: True)
    return subscribes


async def test_a_change_before_a_late_subscription_is_seen_once_that_is_confirmed(
    session_maker: SessionMaker, observer: Connection, user: int, job: Job, late_subscription: asyncio.Event
) -> None:
    """The job was done before Redis knew that somebody listens."""
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, interval=NEVER)
        await registered(2)
        await observer.execute("UPDATE users SET name = 'after'")
        late_subscription.set()
        async with asyncio.timeout(3):
            assert (await task).name == "after"


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
async def test_a_job_that_ended_before_a_late_subscription_ends_its_wait_once_that_is_confirmed(
    session_maker: SessionMaker,
    observer: Connection,
    user: int,
    job: Job,
    late_subscription: asyncio.Event,
    state: str,
) -> None:
    """Although the row is as it was."""
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, interval=NEVER)
        await registered(2)
        await end(observer, state)
        late_subscription.set()
        async with asyncio.timeout(3):
            if state == "done":
                assert (await task).name == "before"
            else:
                with pytest.raises((JobFailedError, JobCancelledError)):
                    await task


@pytest.mark.parametrize("state", ["done", "cancelled"])
async def test_the_bell_tells_of_the_end_without_any_interval(
    session_maker: SessionMaker, coordinator: Coordinator, user: int, job: Job, state: str
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, interval=NEVER)
        await registered()
        began = time.monotonic()
        if state == "done":
            async with job_transaction(delivered(job, session_maker)):
                pass
            assert (await task).name == "before"
        else:
            async with session_maker() as other:
                await cancel_job(other, job.id)
                await other.commit()
            with pytest.raises(JobCancelledError):
                await task
        assert time.monotonic() - began < 1


async def test_a_row_of_a_view_is_the_answer_however_early_its_job_ends(
    session_maker: SessionMaker,
    redis_url: str,
    observer: Connection,
    user: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a shared read has found that PostgreSQL keeps no place for a view's rows."""
    free, read = asyncio.Event(), Reader.identities

    async def late(reader: Reader, keys: Any) -> Any:
        await free.wait()
        return await read(reader, keys)

    monkeypatch.setattr(Reader, "identities", late)
    await observer.execute("CREATE VIEW named_users AS SELECT id, name FROM users")
    async with Coordinator(session_maker, redis=redis_url), session_maker() as session:
        job = await enqueue(session, a_task)
        await session.commit()
        task = waiting(session, NamedUser, user, job=job, interval=NEVER)
        await eventually(lambda: len(waiters()) == 2)
        async with job_transaction(delivered(job, session_maker)) as effect:
            (await effect.get_one(User, user)).name = "after"
        assert (await task).name == "after"
        free.set()
    await observer.execute("DROP VIEW named_users")


async def test_the_bell_tells_of_the_end_also_if_the_row_has_changed_and_until_is_false_of_it(
    session_maker: SessionMaker, coordinator: Coordinator, observer: Connection, user: int, job: Job
) -> None:
    """The row is looked at first when the job's bell rings, and is news; it has no bell of its own here."""
    async with session_maker() as session, session_maker() as other:
        task = waiting(session, User, user, job=job, until=lambda _: False, interval=NEVER, timeout=3)
        await registered()
        await observer.execute("UPDATE users SET name = 'after'")
        await end(observer, "done")
        began = time.monotonic()
        coordinator.ring(other, Job, job.id)
        await other.commit()
        assert (await task).name == "after"
        assert time.monotonic() - began < 1


async def test_changes_that_end_their_waits_cost_no_look_at_the_jobs(
    engine: AsyncEngine, session_maker: SessionMaker, coordinator: Coordinator, observer: Connection
) -> None:
    """Although it is their jobs' bells that ring, and all at once."""
    await observer.execute("INSERT INTO users SELECT n, 'before' FROM generate_series(1, 50) AS n")
    made = [await committed(session_maker, a_task, n) for n in range(1, 51)]
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(session_maker()) for _ in made]
        waits = zip(sessions, made, strict=True)
        tasks = [waiting(session, User, n, job=job, interval=NEVER) for n, (session, job) in enumerate(waits, start=1)]
        await registered()
        await observer.execute("UPDATE users SET name = 'after'")
        with executed(engine) as reads:
            async with session_maker() as other:
                for job in made:
                    coordinator.ring(other, Job, job.id)
                await other.commit()
            assert {row.name for row in await asyncio.gather(*tasks)} == {"after"}
    assert [read for read in reads if "FROM unnest" in read]
    assert not [read for read in reads if "coord_jobs" in read]


async def test_a_change_without_a_bell_is_seen_within_the_interval_beside_a_longer_one(
    session_maker: SessionMaker, coordinator: Coordinator, observer: Connection, user: int, job: Job
) -> None:
    """Also by a wait that nothing else wakes: its job was not handed over when it began, so it looked late."""
    async with session_maker() as one, session_maker() as two:
        longer = waiting(one, User, user, job=job, interval=NEVER)
        await registered()
        own = await enqueue(two, a_task)
        await two.commit()
        shorter = waiting(two, User, user, job=own, interval=0.1, timeout=3)
        await registered(4)
        began = time.monotonic()
        await observer.execute("UPDATE coord_jobs SET state = 'failed' WHERE id = $1", own.id)
        with pytest.raises(JobFailedError):
            await shorter
        assert time.monotonic() - began < 1
        longer.cancel()
        await asyncio.wait([longer])


async def test_a_job_that_ends_without_a_bell_is_seen_within_the_interval_by_a_loop_that_was_idle(
    engine: AsyncEngine,
    session_maker: SessionMaker,
    coordinator: Coordinator,
    observer: Connection,
    user: int,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Watcher, "is_job_pending", lambda *_: True)  # so that its first look is late
    async with session_maker() as session:
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, user, job=job, timeout=0.1)
        pollers = Watcher.of(engine)._pollers.values()
        await eventually(lambda: not any(poller.waiters or poller._awake.is_set() for poller in pollers))
        again = waiting(session, User, user, job=job, interval=0.1)
        await registered()
        await end(observer, "failed")
        async with asyncio.timeout(3):
            with pytest.raises(JobFailedError):
                await again


async def test_the_bell_of_a_job_that_rolls_back_is_not_rung(
    session_maker: SessionMaker, coordinator: Coordinator, user: int, job: Job
) -> None:
    async with session_maker() as session:
        task = waiting(session, User, user, job=job, interval=NEVER, timeout=0.4)
        await registered()
        with pytest.raises(ZeroDivisionError):
            async with job_transaction(delivered(job, session_maker)):
                raise ZeroDivisionError
        with pytest.raises(WaitTimeoutError):
            await task


@pytest.mark.parametrize("rung", [True, False])
async def test_a_job_itself_can_be_waited_for(
    session_maker: SessionMaker, redis_url: str, observer: Connection, job: Job, rung: bool
) -> None:
    async with Coordinator(session_maker, redis=redis_url if rung else None) as coordinator, session_maker() as session:
        if rung:
            await eventually(lambda: coordinator._bell and coordinator._bell.connected)
        interval = NEVER if rung else 0.05
        task = waiting(session, Job, job.id, until=lambda job: job.state.is_final, interval=interval)
        await registered()
        async with job_transaction(delivered(job, session_maker)):
            pass
        ended = await task
        assert (ended.state, ended.id) == (JobState.DONE, job.id)
        assert ended in session
        with pytest.raises(RowNotFoundError):
            await wait_for_row_change(session, Job, uuid4())


@pytest.mark.usefixtures("read_settings")
async def test_a_watch_of_a_job_ends_with_its_final_state(
    session_maker: SessionMaker, observer: Connection, job: Job
) -> None:
    seen: list[tuple[JobState, int]] = []
    async with session_maker() as session, session_maker() as other:
        async with watch_row(session, Job, job.id, columns=[Job.state, Job.attempt], interval=0.05, timeout=5) as rows:
            async for row in rows:
                seen.append((row.state, row.attempt))
                match seen[-1]:
                    case (JobState.QUEUED, 1):
                        await end(observer, "failed")
                    case (JobState.FAILED, 1):
                        await retry_job(other, job.id)
                        await other.commit()
                    case (JobState.QUEUED, 2):
                        await end(observer, "done")
                    case _:
                        break
    assert [state for state, _ in seen] == [JobState.QUEUED, JobState.FAILED, JobState.QUEUED, JobState.DONE]


async def test_a_retry_is_rung(
    session_maker: SessionMaker, coordinator: Coordinator, observer: Connection, job: Job
) -> None:
    await end(observer, "failed")
    async with session_maker() as session, session_maker() as other:
        task = waiting(session, Job, job.id, until=lambda job: not job.state.is_final, interval=NEVER, timeout=1.5)
        await registered()
        began = time.monotonic()
        await retry_job(other, job.id)
        await other.commit()
        assert (await task).attempt == 2
        assert time.monotonic() - began < 1
