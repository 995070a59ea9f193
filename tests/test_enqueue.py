"""Enqueue: a job exists once the caller's transaction has committed and never otherwise, with the given arguments."""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections import OrderedDict, namedtuple
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import StrEnum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from arq.worker import func
from opentelemetry import context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from coord import (
    Job,
    JobState,
    UniqueKeyConflictError,
    call,
    cancel_job,
    enqueue,
    get_transaction,
    job_transaction,
    list_jobs,
    lock_tables,
    periodic,
    set_result,
    task_options,
)
from coord.jobs.model import jobs
from coord.retryable import is_retryable
from tests.ledger import a_task, committed, delivered, statements
from tests.models import User
from tests.serving import engine_at, eventually
from tests.shop import empty_database, waiting_for_locks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")

Pair = namedtuple("Pair", "a b")


class Colour(StrEnum):
    RED = "red"


async def count(observer: Connection) -> int:
    found: int = await observer.fetchval("SELECT count(*) FROM coord_jobs")
    return found


# The caller's transaction


async def test_a_job_exists_once_its_transaction_has_committed(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker() as session:
        job = await enqueue(session, a_task, 5, name="x")
        assert await count(observer) == 0
        await session.commit()
    row = await observer.fetchrow("SELECT * FROM coord_jobs")
    assert row["id"] == job.id
    assert (row["task"], row["queue"], row["state"], row["attempt"]) == ("a_task", "default", "queued", 1)
    assert json.loads(row["arguments"]) == [[5], {"name": "x"}]
    assert (row["max_attempts"], row["timeout"], row["unique_key"], row["finished_at"]) == (None, None, None, None)
    assert abs(row["created_at"] - datetime.now(UTC)) < timedelta(seconds=5)
    assert row["scheduled_at"] <= datetime.now(UTC)


@pytest.mark.parametrize("unique_key", [None, "k"])
async def test_enqueue_rolls_back_with_its_transaction(
    session_maker: SessionMaker, observer: Connection, unique_key: str | None
) -> None:
    async with session_maker() as session:
        await enqueue(session, task_options(a_task, unique_key=unique_key))
        await session.rollback()
        await enqueue(session, task_options(a_task, unique_key=unique_key))
    assert await count(observer) == 0


@pytest.mark.parametrize("unique_key", [None, "k"])
async def test_enqueue_rolls_back_with_its_savepoint_and_the_others_stay(
    session_maker: SessionMaker, observer: Connection, unique_key: str | None
) -> None:
    options = task_options(a_task, unique_key=unique_key)
    async with session_maker() as session:
        before = await enqueue(session, a_task, "before")
        with pytest.raises(ZeroDivisionError):
            async with get_transaction(session):
                await enqueue(session, options, "inside")
                async with get_transaction(session):
                    await enqueue(session, a_task, "deeper")
                raise ZeroDivisionError
        async with get_transaction(session):
            kept = await enqueue(session, options, "kept")
        after = await enqueue(session, a_task, "after")
        await session.commit()
    found = await observer.fetch("SELECT id FROM coord_jobs")
    assert {row["id"] for row in found} == {before.id, kept.id, after.id}


async def test_enqueue_joins_the_block_it_is_in(session_maker: SessionMaker, observer: Connection) -> None:
    async with session_maker() as session:
        async with session.begin():
            await enqueue(session, a_task)
            assert await count(observer) == 0
        assert await count(observer) == 1
        async with lock_tables(session, [User]):
            await enqueue(session, a_task)
            assert await count(observer) == 1
    assert await count(observer) == 2


async def test_many_enqueues_leave_others_their_turns(session_maker: SessionMaker) -> None:
    """Each is a statement that is awaited: the event loop goes on between them."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(turn())
    async with session_maker() as session:
        await enqueue(session, a_task)
        before = turns
        for number in range(300):
            await enqueue(session, a_task, number)
        assert turns - before >= 300
        await session.rollback()
    other.cancel()


async def test_a_task_may_call_its_parameters_anything(session_maker: SessionMaker, observer: Connection) -> None:
    """Also what `enqueue` and `task_options` call their own."""
    names = ["session", "task", "args", "kwargs", "unique_key", "delay", "queue", "priority", "self", "job", "options"]
    made = await committed_with(session_maker, {name: number for number, name in enumerate(names)})
    (stored,) = await observer.fetch("SELECT arguments FROM coord_jobs")
    assert json.loads(stored["arguments"])[1] == made.arguments[1] == {n: i for i, n in enumerate(names)}


async def committed_with(session_maker: SessionMaker, kwargs: dict[str, Any]) -> Job:
    options: Any = task_options(a_task, unique_key="k")
    async with session_maker() as session:
        job: Job = await enqueue(session, options, **kwargs)
        await session.commit()
    return job


@pytest.mark.parametrize("unique_key", [None, "k"])
async def test_enqueue_flushes_nothing_and_so_locks_nothing_else(
    session_maker: SessionMaker, observer: Connection, unique_key: str | None
) -> None:
    """A flush would take row locks before the caller takes its table locks: an upgrade, and a deadlock one day."""
    async with session_maker() as session:
        pending = User(id=1)
        session.add(pending)
        await enqueue(session, task_options(a_task, unique_key=unique_key))
        assert pending in session.new
        locked = await observer.fetch(
            "SELECT DISTINCT relation::regclass::text AS name FROM pg_locks WHERE mode = 'RowExclusiveLock'"
        )
        assert {row["name"] for row in locked if not row["name"].startswith("coord_jobs")} == set()
        await session.commit()
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


@pytest.mark.parametrize("expires", [False, True])
async def test_the_job_is_readable_after_the_commit_and_after_the_session(engine: AsyncEngine, expires: bool) -> None:
    async with async_sessionmaker(engine, expire_on_commit=expires)() as session:
        made = await enqueue(session, task_options(a_task, unique_key="k"), 5)
        await session.commit()
        joined = await enqueue(session, task_options(a_task, unique_key="k"), 5)
        await session.commit()
    for job in (made, joined):
        assert (job.task, job.state, job.attempt, job.arguments) == ("a_task", JobState.QUEUED, 1, [[5], {}])
        assert (job.started_at, job.error, job.result) == (None, None, None)
        assert job.created_at.tzinfo is not None
        assert "a_task" in repr(job)
    assert made.id == joined.id
    assert (made.joined, joined.joined) == (False, True)
    assert made.created_at == joined.created_at
    assert made.scheduled_at == joined.scheduled_at


async def test_the_caller_may_change_what_it_has_given_afterwards(
    session_maker: SessionMaker, observer: Connection
) -> None:
    """What is handed over at the commit is what the ledger has."""
    given: dict[str, Any] = {"lines": [1]}
    async with session_maker() as session:
        job = await enqueue(session, a_task, given)
        given["lines"].append(object())
        assert job.arguments == [[{"lines": [1]}], {}]


async def test_enqueue_is_one_statement(single: AsyncEngine) -> None:
    maker = async_sessionmaker(single)
    async with maker() as session:
        await list_jobs(session)  # once an engine the ledger is looked for
    async with statements(single) as seen, maker() as session:
        await enqueue(session, a_task, 5)
    assert len(seen) == 1
    assert seen[0].startswith("INSERT INTO coord_jobs")
    async with statements(single) as seen, maker() as session:
        await enqueue(session, task_options(a_task, unique_key="k"))
        await enqueue(session, task_options(a_task, unique_key="k"))
    assert [statement.split()[0] for statement in seen] == ["SELECT", "INSERT", "SELECT"]


async def test_a_rollback_per_test_session_enqueues_in_its_connections_transaction(
    engine: AsyncEngine, observer: Connection
) -> None:
    async with engine.connect() as connection, connection.begin() as outer:
        maker = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
        async with maker() as session:
            job = await enqueue(session, task_options(a_task, unique_key="k"), 1)
            await session.commit()
            await enqueue(session, a_task, 2)
            await session.rollback()
        async with maker() as session:
            assert (await enqueue(session, task_options(a_task, unique_key="k"), 1)).id == job.id
            assert list(await session.scalars(select(jobs.c.id))) == [job.id]
        await outer.rollback()
    assert await count(observer) == 0


async def test_a_session_that_is_not_asyncpgs_is_refused() -> None:
    async with engine_at("sqlite+aiosqlite://") as engine, async_sessionmaker(engine)() as session:
        with pytest.raises(ValueError, match=r"postgresql\+asyncpg"):
            await enqueue(session, a_task)
        assert not session.in_transaction()


@pytest.mark.parametrize("level", ["engine", "session", "connection"])
@pytest.mark.parametrize("first", ["enqueue", "read"])
async def test_the_ledger_has_one_place_whatever_schema_the_callers_statements_are_under(
    engine: AsyncEngine, session_maker: SessionMaker, observer: Connection, level: str, first: str
) -> None:
    """Or a tenant's job would be one that no worker sees."""
    translated: dict[str, Any] = {"schema_translate_map": {None: "Other Shop"}}
    maker = async_sessionmaker(engine)
    async with async_sessionmaker(engine.execution_options(**translated) if level == "engine" else engine)() as session:
        if level == "session":
            await session.connection(execution_options=translated)
        if level == "connection":
            await (await session.connection()).execution_options(**translated)
        if first == "read":
            await session.execute(text("SELECT 1"))
        job = await enqueue(session, task_options(a_task, unique_key="k"))
        assert (await enqueue(session, task_options(a_task, unique_key="k"))).joined
        await session.commit()
    assert await observer.fetchval("SELECT id FROM coord_jobs") == job.id
    async with job_transaction(delivered(job, maker)) as session:
        await set_result(session, 7)
    found = await observer.fetchrow("SELECT state, result FROM coord_jobs")
    assert (found["state"], found["result"]) == ("done", "7")


async def test_under_repeatable_read_a_job_is_made_joined_or_refused_as_retryable(
    engine: AsyncEngine, session_maker: SessionMaker
) -> None:
    options = task_options(a_task, unique_key="k")
    maker = async_sessionmaker(engine.execution_options(isolation_level="REPEATABLE READ"))
    async with maker() as session:
        await session.execute(select(User))  # its snapshot is older than the job
        await enqueue(session, a_task)
        there = await committed(session_maker, options)
        with pytest.raises(DBAPIError) as caught:
            await enqueue(session, options)
        assert is_retryable(caught.value)
        await session.rollback()
        assert (await enqueue(session, options)).id == there.id


async def test_a_missing_ledger_is_said_and_how_to_make_it(database_url: str) -> None:
    async with empty_database(database_url) as url:
        engine = create_async_engine(url)
        for options in (a_task, task_options(a_task, unique_key="k")):
            async with async_sessionmaker(engine)() as session:
                with pytest.raises(ProgrammingError, match="coord_jobs") as caught:
                    await enqueue(session, options)
                assert "coord schema --apply" in "".join(caught.value.__notes__)
        await engine.dispose()


# Unique keys


async def test_an_unfinished_job_of_the_same_key_is_joined(session_maker: SessionMaker, observer: Connection) -> None:
    options = task_options(a_task, unique_key="k", max_attempts=3, timeout=5)
    made = await committed(session_maker, options, 1, name="ä\0")
    joined = await committed(session_maker, task_options(a_task, unique_key="k"), 1, name="ä\0")
    assert not made.joined
    assert joined.joined
    assert (joined.id, joined.max_attempts, joined.timeout) == (made.id, 3, 5.0)
    assert await count(observer) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": {"x": 1, "y": {"z": 2, "é": 3}}}, {"a": {"y": {"é": 3, "z": 2}, "x": 1}}),
        ({"a": [{"x": 1, "y": 2}], "b": None}, {"b": None, "a": [{"y": 2, "x": 1}]}),
    ],
)
async def test_the_order_of_keyword_arguments_makes_no_other_job(
    session_maker: SessionMaker, first: dict[str, Any], second: dict[str, Any]
) -> None:
    made = await committed(session_maker, task_options(a_task, unique_key="k"), **first)
    joined = await committed(session_maker, task_options(a_task, unique_key="k"), **second)
    assert (joined.joined, joined.id) == (True, made.id)


async def test_a_key_belongs_to_its_task(session_maker: SessionMaker) -> None:
    one = await committed(session_maker, task_options(a_task, unique_key="k"))
    other = await committed(session_maker, task_options("another", unique_key="k"))
    unkeyed = await committed(session_maker, a_task)
    assert len({one.id, other.id, unkeyed.id}) == 3


async def test_other_arguments_under_the_same_key_are_a_conflict(
    session_maker: SessionMaker, observer: Connection
) -> None:
    job = await committed(session_maker, task_options(a_task, unique_key="k"), 1)
    async with session_maker() as session:
        for arguments in ((2,), (1.0,), (True,), ()):
            with pytest.raises(UniqueKeyConflictError, match=str(job.id)) as caught:
                await enqueue(session, task_options(a_task, unique_key="k"), *arguments)
            assert not caught.value.retryable
        await enqueue(session, a_task, 3)
        await session.commit()
    assert await count(observer) == 2, "a conflict has cost the caller its transaction"


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
async def test_a_key_is_free_again_when_its_job_has_ended(
    session_maker: SessionMaker, observer: Connection, end: str
) -> None:
    options = task_options(a_task, unique_key="k")
    job = await committed(session_maker, options, 1)
    match end:
        case "done":
            async with job_transaction(delivered(job, session_maker)):
                pass
        case "failed":
            await observer.execute("UPDATE coord_jobs SET state = 'failed', finished_at = now()")
        case "cancelled":
            async with session_maker() as session:
                await cancel_job(session, job.id)
                await session.commit()
    again = await committed(session_maker, options, 2)
    assert again.id != job.id
    assert not again.joined


async def test_a_thousand_concurrent_enqueues_of_one_key_make_one_job(
    session_maker: SessionMaker, observer: Connection
) -> None:
    """Some of them, the first too, roll back: whoever has committed has the one job."""
    found: list[Job] = []

    async def one(n: int) -> None:
        async with session_maker() as session:
            job = await enqueue(session, task_options(a_task, unique_key="k"), 1)
            if n % 7 == 0:
                await session.rollback()
            else:
                await session.commit()
                found.append(job)

    await asyncio.gather(*(one(n) for n in range(1000)))
    assert len(found) == 857
    assert {job.id for job in found} == {await observer.fetchval("SELECT id FROM coord_jobs")}
    assert sum(not job.joined for job in found) == 1


async def test_joining_a_job_does_not_wait_for_its_transaction(
    session_maker: SessionMaker, observer: Connection
) -> None:
    options = task_options(a_task, unique_key="k")
    job = await committed(session_maker, options)
    async with job_transaction(delivered(job, session_maker)):
        async with asyncio.timeout(2):
            assert (await committed(session_maker, options)).id == job.id
        with pytest.raises(UniqueKeyConflictError):
            await committed(session_maker, options, "other")
    assert (await committed(session_maker, options)).id != job.id


async def test_a_concurrent_enqueue_of_the_same_key_waits_for_the_first_to_commit_or_roll_back(
    session_maker: SessionMaker, observer: Connection
) -> None:
    options = task_options(a_task, unique_key="k")
    async with session_maker() as first:
        lost = await enqueue(first, options)
        second = asyncio.create_task(committed(session_maker, options))
        await eventually(lambda: waiting_for_locks(observer, "INSERT INTO coord_jobs"))
        await first.rollback()
        made = await second
        assert (made.joined, made.id == lost.id) == (False, False)
        mine = await enqueue(first, task_options(a_task, unique_key="other"))
        third = asyncio.create_task(committed(session_maker, task_options(a_task, unique_key="other")))
        await eventually(lambda: waiting_for_locks(observer, "INSERT INTO coord_jobs"))
        await first.commit()
        assert (await third).id == mine.id


async def test_the_longest_name_and_key_fit_the_index(session_maker: SessionMaker) -> None:
    key = "".join(chr(0x1F300 + n % 700) for n in range(500))
    name = "".join(chr(33 + n * 7 % 90) for n in range(500))
    assert (await committed(session_maker, task_options(name, unique_key=key))).unique_key == key
    assert (await committed(session_maker, task_options(name, unique_key=key))).joined


# What is run, and when


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (a_task, "a_task"),
        ("a.name", "a.name"),
        (func(a_task, name="another"), "another"),
        (task_options("by name"), "by name"),
        (task_options(a_task), "a_task"),
    ],
)
async def test_a_task_is_called_what_arq_calls_it(session_maker: SessionMaker, task: Any, name: str) -> None:
    assert (await committed(session_maker, task)).task == name


@pytest.mark.parametrize(
    "task", [None, 5, "", "a\0b", "\ud800", "x" * 501, "é" * 251, functools.partial(a_task, None), User]
)
async def test_anything_but_a_task_is_refused_before_any_sql(session_maker: SessionMaker, task: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="task"):
        task_options(task)
    async with session_maker() as session:
        with pytest.raises((TypeError, ValueError), match="task"):
            await enqueue(session, task)
        assert not session.in_transaction()


async def test_a_delay_is_seconds_from_now_or_a_time(session_maker: SessionMaker, observer: Connection) -> None:
    now = datetime.now(UTC)
    tomorrow = now.astimezone(timezone(timedelta(hours=-11))) + timedelta(days=1)
    for delay, expected in (
        (90, now + timedelta(seconds=90)),
        (0.5, now + timedelta(seconds=0.5)),
        (timedelta(minutes=3), now + timedelta(minutes=3)),
        (tomorrow, tomorrow),
    ):
        job = await committed(session_maker, task_options(a_task, delay=delay))
        due = await observer.fetchval("SELECT scheduled_at FROM coord_jobs WHERE id = $1", job.id)
        assert job.scheduled_at == due
        assert timedelta(0) <= due - expected < timedelta(seconds=2)


@pytest.mark.parametrize("delay", [None, 0, timedelta(0), datetime(1970, 1, 1, tzinfo=UTC), datetime.min])
async def test_a_time_in_the_past_is_now(session_maker: SessionMaker, delay: Any) -> None:
    if delay == datetime.min:
        delay = datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    job = await committed(session_maker, task_options(a_task, delay=delay))
    assert before <= job.scheduled_at <= datetime.now(UTC)


@pytest.mark.parametrize(
    "options",
    [
        {"delay": datetime(2030, 1, 1)},
        {"delay": -1},
        {"delay": timedelta(microseconds=-1)},
        {"delay": math.nan},
        {"delay": math.inf},
        {"delay": 1e15},
        {"delay": 10**400},
        {"delay": timedelta.max},
        {"delay": datetime.max.replace(tzinfo=UTC)},
        {"delay": datetime.max.replace(tzinfo=timezone(timedelta(hours=-14)))},
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": True},
        {"max_attempts": 2.0},
        {"max_attempts": 10**9},
        {"max_attempts": 10**30},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"timeout": 1e299},
        {"queue": ""},
        {"queue": "a\0b"},
        {"queue": "\udfff"},
        {"unique_key": ""},
        {"unique_key": "a\0b"},
        {"unique_key": "\ud800"},
        {"unique_key": "x" * 2001},
        {"queue": "x" * 501},
    ],
    ids=str,
)
async def test_options_that_make_no_sense_are_a_value_error_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))) as caught:
        task_options(a_task, **options)
    assert not isinstance(caught.value, UnicodeError)


@pytest.mark.parametrize(
    "options",
    [
        {"delay": "5"},
        {"delay": True},
        {"timeout": "5s"},
        {"timeout": False},
        {"max_attempts": "3"},
        {"queue": 5},
        {"unique_key": 5},
        {"unique_key": b"k"},
    ],
    ids=str,
)
async def test_options_of_the_wrong_kind_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        task_options(a_task, **options)


async def test_options_reach_the_ledger(session_maker: SessionMaker, observer: Connection) -> None:
    options = task_options(
        a_task, unique_key="k", queue="slow & rare", max_attempts=3, timeout=timedelta(minutes=2), delay=60
    )
    job = await committed(session_maker, options)
    row = await observer.fetchrow(
        "SELECT queue, max_attempts, timeout, unique_key FROM coord_jobs WHERE id = $1", job.id
    )
    assert tuple(row) == ("slow & rare", 3, 120.0, "k")


# Arguments

_circular: list[Any] = []
_circular.append(_circular)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    "argument",
    [
        (1, 2),
        [(1,)],
        {"a": (1,)},
        Pair(1, 2),
        {1: "a"},
        {None: 1},
        {True: 1},
        {"a": {2.5: 1}},
        {1, 2},
        math.nan,
        math.inf,
        [-math.inf],
        b"bytes",
        Decimal("1.5"),
        datetime(2026, 1, 1, tzinfo=UTC),
        timedelta(seconds=5),
        uuid4(),
        object(),
        a_task,
        range(3),
        1j,
        _circular,
        nested(101),
        nested(100_000),
        10**5000,
        "\ud83d\ude00",  # two lone surrogates, which JSON takes for one character
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_json_would_change_is_a_type_error_before_any_sql(
    session_maker: SessionMaker, argument: Any
) -> None:
    async with session_maker() as session:
        with pytest.raises(TypeError, match="a_task: the arguments"):
            await enqueue(session, a_task, argument)
        with pytest.raises(TypeError, match="a_task: the arguments"):
            await enqueue(session, a_task, name=argument)
        assert not session.in_transaction()


ODD = [
    None,
    True,
    0,
    -0.0,
    0.1 + 0.2,
    5e-324,
    1.7976931348623157e308,
    2**53 + 1,
    -(2**64),
    10**4000,
    "",
    "ä€😀",
    "\0",
    "\ud800 alone",
    "\u2028\x7f\\\"'/",
    [],
    {},
    {"": {"\0": [None]}},
    {"b": 1, "a": 2},
    nested(90),
]


MISFITS: list[Any] = [
    ((7,), {}, "missing a required argument: 'seat'"),
    ((7, 8, 9), {}, "too many positional arguments"),
    ((7,), {"seats": 8}, "missing a required argument: 'seat'"),
    ((7, 8), {"row": 1}, "got an unexpected keyword argument 'row'"),
]


async def book_seat(ctx: Any, show: int, seat: int, *, aisle: bool = False) -> None: ...


@pytest.mark.parametrize(("args", "kwargs", "says"), MISFITS)
@pytest.mark.parametrize("make", [lambda: book_seat, lambda: task_options(book_seat), lambda: func(book_seat)])
async def test_arguments_that_the_task_does_not_take_are_refused_before_any_sql(
    session_maker: SessionMaker, make: Any, args: Any, kwargs: Any, says: str
) -> None:
    task: Any = make()
    wanted = f"book_seat(ctx, show, seat, *, aisle=False) does not take these arguments after the context: {says}"
    for calling in (call, lambda task, *args, **kwargs: periodic(task, "* * * * *", *args, **kwargs)):
        with pytest.raises(TypeError, match=says) as refused:
            calling(task, *args, **kwargs)
        assert wanted in str(refused.value)
    async with session_maker() as session:
        with pytest.raises(TypeError, match=says) as refused:
            await enqueue(session, task, *args, **kwargs)
        assert wanted in str(refused.value)
        assert not session.in_transaction()


async def test_arguments_are_compared_with_what_workers_call_and_of_a_name_with_nothing(
    session_maker: SessionMaker,
) -> None:
    @functools.wraps(book_seat)
    async def logged(*args: Any, **kwargs: Any) -> None:
        await book_seat(*args, **kwargs)

    anything: Any = logged
    with pytest.raises(TypeError, match="missing a required argument: 'seat'"):
        await committed(session_maker, anything, 7)
    assert (await committed(session_maker, anything, 7, seat=8)).arguments == [[7], {"seat": 8}]
    assert (await committed(session_maker, "book_seat", 7)).arguments == [[7], {}]


async def test_a_method_and_a_callable_without_a_hash_are_compared_too(session_maker: SessionMaker) -> None:
    class Office(list[Any]):
        async def book(self, ctx: Any, seat: int) -> None: ...

        async def __call__(self, ctx: Any, seat: int) -> None: ...

    office: Any = Office()
    office.__qualname__ = "office"
    for task in (office, office.book):
        with pytest.raises(TypeError, match="missing a required argument: 'seat'"):
            await committed(session_maker, task)
        await committed(session_maker, task, 7)


@pytest.mark.parametrize(
    "argument", [OrderedDict(b=1, a=2), Colour.RED, [Colour.RED], {"a": Colour.RED}, HTTPStatus.OK]
)
async def test_what_would_arrive_as_another_type_is_refused_before_any_sql(
    session_maker: SessionMaker, observer: Connection, argument: Any
) -> None:
    """However equal it may be to what it would arrive as."""
    async with session_maker() as session:
        with pytest.raises(TypeError, match="would arrive as"):
            await enqueue(session, a_task, argument)
        assert not session.in_transaction()


async def test_arguments_above_a_mebibyte_are_refused_before_any_sql(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        with pytest.raises(TypeError, match="at most 1048576 bytes"):
            await enqueue(session, a_task, "x" * (1 << 20))
        await enqueue(session, a_task, "x" * ((1 << 20) - 100))


@pytest.mark.parametrize("argument", ODD, ids=lambda value: repr(value)[:20])
async def test_unusual_json_arrives_equal(session_maker: SessionMaker, argument: Any) -> None:
    job = await committed(session_maker, task_options(a_task, unique_key="k"), argument, name=argument)
    async with session_maker() as session:
        stored = await session.get(Job, job.id)
        assert stored is not None
        assert stored.arguments == [[argument], {"name": argument}]
        if isinstance(argument, float):
            assert repr(stored.arguments[0][0]) == repr(argument), "a sign was lost"
        assert (await enqueue(session, task_options(a_task, unique_key="k"), argument, name=argument)).joined
    async with job_transaction(delivered(stored, session_maker)) as session:
        await set_result(session, argument)
    async with session_maker() as session:
        stored = await session.get(Job, job.id)
        assert stored is not None
        assert stored.state is JobState.DONE
        assert stored.result == argument


@pytest.mark.parametrize(
    "serializers",
    [
        {"json_serializer": functools.partial(json.dumps, indent=2, ensure_ascii=False, sort_keys=True)},
        {"json_deserializer": functools.partial(json.loads, parse_float=Decimal)},
    ],
    ids=["serializer", "deserializer"],
)
async def test_an_engines_own_json_does_not_touch_the_ledgers(database_url: str, serializers: dict[str, Any]) -> None:
    engine = create_async_engine(database_url, **serializers)
    maker = async_sessionmaker(engine)
    options = task_options(a_task, unique_key="k")
    job = await committed(maker, options, {"b": 1.50, "a": "ä"})
    assert (await committed(maker, options, {"b": 1.50, "a": "ä"})).joined
    async with maker() as session:
        stored = await session.get(Job, job.id)
        assert stored is not None
        assert type(stored.arguments[0][0]["b"]) is float
    async with job_transaction(delivered(stored, maker)) as session:
        await set_result(session, {"ü": 2.5})
    async with maker() as session:
        stored = await session.get(Job, job.id, populate_existing=True)
        assert stored is not None
        assert (stored.state, stored.result) == (JobState.DONE, {"ü": 2.5})
        await session.execute(text("SELECT 1"))
    await engine.dispose()


@pytest.fixture
async def picky(observer: Connection) -> AsyncIterator[None]:
    """The ledger takes no job of the task "refused"."""
    await observer.execute("ALTER TABLE coord_jobs ADD CONSTRAINT picky CHECK (task <> 'refused')")
    yield
    await observer.execute("ALTER TABLE coord_jobs DROP CONSTRAINT picky")


@pytest.mark.usefixtures("picky", "tables")
@pytest.mark.parametrize("raised", [False, True])
async def test_a_savepoint_contains_a_job_that_the_ledger_refuses(
    single: AsyncEngine, observer: Connection, raised: bool
) -> None:
    """Also on a connection that waits for no answer otherwise."""
    sessions = async_sessionmaker(single, expire_on_commit=False)
    for number in range(3):
        async with sessions() as session:
            session.add(User(id=number))
            await enqueue(session, a_task, number)
            with pytest.raises(DBAPIError, match="picky"):
                async with session.begin_nested():
                    await enqueue(session, "refused")
                    if raised:
                        raise AssertionError("it was taken")
            await session.commit()
        assert await observer.fetchval("SELECT count(*) FROM users") == number + 1
        assert await count(observer) == number + 1


@pytest.mark.usefixtures("picky", "tables")
async def test_a_job_that_the_ledger_refuses_fails_the_commit_at_the_latest(
    single: AsyncEngine, observer: Connection
) -> None:
    sessions = async_sessionmaker(single, expire_on_commit=False)
    await committed(sessions, a_task)
    for number in range(3):
        with pytest.raises(DBAPIError, match="picky"):
            async with sessions() as session:
                session.add(User(id=number))
                await session.flush()
                await enqueue(session, "refused")
                await session.commit()
        assert await observer.fetchval("SELECT count(*) FROM users") == 0


@pytest.mark.usefixtures("ledger")
async def test_a_first_statement_that_cannot_be_encoded_leaves_a_transaction_to_enqueue_in(
    single: AsyncEngine, observer: Connection
) -> None:
    sessions = async_sessionmaker(single, expire_on_commit=False)
    for number in range(1, 4):
        async with sessions() as session:
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT CAST(:n AS int)"), {"n": "x"})
            await enqueue(session, a_task)
            await session.commit()
        assert await count(observer) == number


async def test_a_job_carries_the_trace_of_who_enqueued_it(session_maker: SessionMaker) -> None:
    span = NonRecordingSpan(SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=TraceFlags(1)))
    token = context.attach(set_span_in_context(span))
    try:
        traced = await committed(session_maker)
    finally:
        context.detach(token)
    plain = await committed(session_maker)
    async with session_maker() as session:
        rows = dict((await session.execute(select(jobs.c.id, jobs.c.trace))).all())
    assert rows == {traced.id: {"traceparent": f"00-{1:032x}-{2:016x}-01"}, plain.id: None}
