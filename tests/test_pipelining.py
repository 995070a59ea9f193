"""Connections on which BEGIN and the insert of a job travel with the next statement: what that may never change."""

from __future__ import annotations

import asyncio
import io
import os
import ssl
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import pytest
import uvloop
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from coord.postgresql.engine import prepare
from coord.postgresql.pipelining import INSERTS, PipeliningConnection
from tests.proxy import Proxy, anonymous
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from asyncpg import Connection

    Use = Callable[[Connection], Awaitable[Any]]

INSERT = "INSERT INTO pipelined (id, name) VALUES ($1, $2)"
BROKEN = "BEGIN NONSENSE;"


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Any]:
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn, connection_class=PipeliningConnection, **options)
    try:
        yield connection
    finally:
        connection.terminate()


@pytest.fixture
async def table(observer: Connection) -> AsyncIterator[None]:
    await observer.execute("DROP TABLE IF EXISTS pipelined; CREATE TABLE pipelined (id int PRIMARY KEY, name text)")
    yield
    await observer.execute("DROP TABLE pipelined")


@pytest.fixture(params=["plain", "TLS"])
async def connection(request: pytest.FixtureRequest, database_url: str, table: None) -> AsyncIterator[Any]:
    """It has inserted before, and so is ahead the next time; copied, and so has nothing to ask before."""
    async with AsyncExitStack() as stack:
        url, options = database_url, {}
        if request.param == "TLS":
            url = (await stack.enter_async_context(Proxy(database_url, tls=True).opened())).url
            options = {"ssl": anonymous(ssl.PROTOCOL_TLS_CLIENT)}
        connection = await stack.enter_async_context(connected(url, **options))
        await copied(connection)
        await connection.execute("TRUNCATE pipelined")
        await connection.insert_ahead(INSERT, 1, "first")
        yield connection


async def names(observer: Connection) -> list[str]:
    return [row["name"] for row in await observer.fetch("SELECT name FROM pipelined ORDER BY id")]


async def is_usable(connection: Any) -> bool:
    """For transactions as well."""
    await connection.execute("ROLLBACK;")
    async with connection.transaction():
        return bool(await connection.fetchval("SELECT 7") == 7)


async def prepared(connection: Connection) -> None:
    await connection.fetch("INSERT INTO pipelined VALUES (77, 'after')")


async def known(connection: Connection) -> None:
    await connection.fetch("SELECT 7")


async def simple(connection: Connection) -> None:
    await connection.execute("INSERT INTO pipelined VALUES (77, 'after'); SELECT 7")


async def many(connection: Connection) -> None:
    await connection.executemany("INSERT INTO pipelined VALUES ($1, $2)", [(77, "after"), (78, "after")])


async def copied(connection: Connection) -> None:
    await connection.copy_records_to_table("pipelined", records=[(77, "after")])


async def copied_from(connection: Connection) -> None:
    await connection.copy_from_query("SELECT * FROM pipelined", output=os.devnull)


async def copied_to(connection: Connection) -> None:
    await connection.copy_to_table("pipelined", source=io.BytesIO(b"77\tafter\n"))


async def copied_whole(connection: Connection) -> None:
    await connection.copy_from_table("pipelined", output=os.devnull)


async def commit(connection: Connection) -> None:
    await connection.execute("COMMIT;")


NEXT = [prepared, known, simple, many, copied, copied_from, copied_to, copied_whole, commit]


# Round trips


async def test_a_transaction_with_a_row_and_a_job_takes_two_round_trips(database_url: str, table: None) -> None:
    async with Proxy(database_url).opened() as wire, connected(wire.url) as connection:
        counts = []
        for number in range(3):
            before = wire.round_trips
            async with connection.transaction():
                await connection.insert_ahead(INSERT, number, "a job")
                await connection.fetch("INSERT INTO pipelined VALUES ($1, 'a row')", 100 + number)
            counts.append(wire.round_trips - before)
        assert counts[1:] == [2, 2], f"with {counts[0]} when everything was new"


async def test_what_has_only_begun_waits_for_nothing(database_url: str, table: None) -> None:
    async with Proxy(database_url).opened() as wire, connected(wire.url) as connection:
        await connection.insert_ahead(INSERT, 1, "first")
        before = wire.round_trips
        await connection.execute("BEGIN;")
        await connection.insert_ahead(INSERT, 2, "second")
        assert wire.round_trips == before
        assert connection.is_in_transaction()


async def test_an_engine_that_is_prepared_has_such_connections(database_url: str) -> None:
    engine = create_async_engine(database_url)
    prepare(engine)
    async with engine.connect() as connection:
        assert type((await connection.get_raw_connection()).driver_connection) is PipeliningConnection
    await engine.dispose()


async def test_a_class_or_a_creator_of_the_applications_own_is_left_to_it(database_url: str) -> None:
    class Own(asyncpg.Connection):  # type: ignore[misc]
        pass

    dsn = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)

    async def creator() -> Connection:
        return await asyncpg.connect(dsn, connection_class=Own)

    for options in ({"connect_args": {"connection_class": Own}}, {"async_creator": creator}):
        engine = create_async_engine(database_url, **options)
        prepare(engine)
        async with engine.connect() as connection:
            assert type((await connection.get_raw_connection()).driver_connection) is Own
        await engine.dispose()


# Errors


@pytest.mark.parametrize("use", NEXT)
async def test_nothing_runs_outside_a_transaction_that_could_not_begin(
    connection: Any, observer: Connection, use: Use
) -> None:
    await connection.fetch("SELECT 7")
    await connection.execute(BROKEN)
    with pytest.raises(asyncpg.PostgresSyntaxError, match="NONSENSE"):
        await use(connection)
    assert await is_usable(connection)
    assert await names(observer) == ["first"]


@pytest.mark.parametrize("use", NEXT)
async def test_an_insert_that_fails_is_the_next_ones_error_and_nothing_is_committed(
    connection: Any, observer: Connection, use: Use
) -> None:
    await connection.fetch("SELECT 7")
    await connection.execute("BEGIN;")
    await connection.fetch("INSERT INTO pipelined VALUES (50, 'before')")
    await connection.insert_ahead(INSERT, 1, "again")
    with pytest.raises(asyncpg.UniqueViolationError):
        await use(connection)
    assert await is_usable(connection)
    assert await names(observer) == ["first"]


@pytest.mark.parametrize("begin", ["BEGIN;", BROKEN])
async def test_to_roll_back_is_no_error_whatever_was_ahead(connection: Any, observer: Connection, begin: str) -> None:
    await connection.execute(begin)
    await connection.insert_ahead(INSERT, 1, "again")
    await connection.execute("ROLLBACK;")
    assert not connection.is_in_transaction()
    assert await is_usable(connection)
    assert await names(observer) == ["first"]


@pytest.mark.parametrize("use", NEXT)
async def test_an_error_that_comes_while_nothing_is_asked_is_the_next_ones(
    connection: Any, observer: Connection, use: Use
) -> None:
    await connection.fetch("SELECT 7")
    await connection.execute("BEGIN;")
    await connection.insert_ahead(INSERT, 1, "again")
    await eventually(lambda: asyncio.sleep(0, connection._ahead._error))
    with pytest.raises(asyncpg.UniqueViolationError):
        await use(connection)
    assert await is_usable(connection)
    assert await names(observer) == ["first"]


async def test_a_connection_that_the_server_ends_while_nothing_is_asked_is_closed(
    connection: Any, observer: Connection
) -> None:
    await connection.fetch("SELECT 7")
    await observer.execute("BEGIN; LOCK TABLE pipelined")
    await connection.execute("BEGIN;")
    await connection.insert_ahead(INSERT, 2, "second")
    await observer.fetchval("SELECT pg_terminate_backend($1)", connection.get_server_pid())
    await eventually(lambda: asyncio.sleep(0, connection.is_closed()))
    await observer.execute("COMMIT")
    with pytest.raises(asyncpg.InterfaceError):
        await connection.fetch("SELECT 7")
    assert await names(observer) == ["first"]


async def test_a_failure_known_only_at_the_commit_is_the_commits(database_url: str, table: None) -> None:
    """By SQLAlchemy, whose transaction it is."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    prepare(engine)
    for expected in (1, 1):
        with suppress(DBAPIError):
            async with engine.begin() as connection:
                await connection.execute(text("SELECT 1"))
                driver = (await connection.get_raw_connection()).driver_connection
                assert driver is not None
                await driver.insert_ahead(INSERT, 1, "once")
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM pipelined")) == expected
    await engine.dispose()


async def test_a_commit_without_its_transaction_is_an_error(connection: Any) -> None:
    with pytest.raises(asyncpg.NoActiveSQLTransactionError):
        await connection.execute("COMMIT;")
    assert await is_usable(connection)


async def test_a_commit_that_rolls_back_is_an_error_whoever_kept_the_first_one(
    database_url: str, table: None, observer: Connection
) -> None:
    """PostgreSQL answers it with ROLLBACK; a hook that asks the driver itself may have swallowed why."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    prepare(engine)
    for number in range(3):
        with pytest.raises(DBAPIError, match="cannot commit"):
            async with engine.begin() as connection:
                await connection.execute(text(f"INSERT INTO pipelined VALUES ({number}, 'lost')"))
                driver = (await connection.get_raw_connection()).driver_connection
                assert driver is not None
                with suppress(asyncpg.DivisionByZeroError):
                    await driver.execute("SELECT 1/0")
        assert await names(observer) == []
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO pipelined VALUES (7, 'kept')"))
    assert await names(observer) == ["kept"]
    await engine.dispose()


@pytest.mark.parametrize("method", ["executemany", "fetchmany"])
async def test_many_that_cannot_be_encoded_end_no_transaction(
    connection: Any, observer: Connection, method: str
) -> None:
    """asyncpg rolls back then, unless it knows that there is one."""
    for _ in range(2):
        await connection.execute("BEGIN;")
        await connection.insert_ahead(INSERT, 2, "second")
        with pytest.raises(asyncpg.DataError):
            await getattr(connection, method)("INSERT INTO pipelined VALUES ($1, $2)", [(77, "after"), ("x", "after")])
        await connection.fetch("INSERT INTO pipelined VALUES (3, 'third')")
        assert await names(observer) == ["first"]
        await connection.execute("ROLLBACK;")
    assert await names(observer) == ["first"]


@pytest.mark.parametrize("how", ["prepare", "fetch"])
async def test_what_is_only_prepared_leaves_the_transaction_known(
    connection: Any, observer: Connection, how: str
) -> None:
    await connection.execute("BEGIN;")
    await connection.insert_ahead(INSERT, 2, "second")
    if how == "prepare":
        await connection.prepare("SELECT 41")
    else:
        with pytest.raises(asyncpg.DataError):
            await connection.fetch("SELECT $1::int + 41", "x")
    assert connection.is_in_transaction()
    await connection.execute("COMMIT;")
    assert await names(observer) == ["first", "second"]


async def test_a_cursor_may_come_first(connection: Any, database_url: str) -> None:
    for _ in range(2):
        async with connection.transaction():
            await connection.insert_ahead(INSERT, 2, "second")
            assert [row["name"] async for row in connection.cursor("SELECT name FROM pipelined WHERE id < 5")]
            await connection.execute("DELETE FROM pipelined WHERE id = 2")
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    prepare(engine)
    for _ in range(2):
        async with engine.connect() as pooled:
            rows = await pooled.stream(text("SELECT name FROM pipelined"))
            assert [row async for row in rows] == [("first",)]
    await engine.dispose()


async def test_reset_ends_what_has_only_begun(connection: Any, observer: Connection) -> None:
    await connection.execute("BEGIN;")
    await connection.insert_ahead(INSERT, 2, "second")
    await connection.reset()
    assert not connection.is_in_transaction()
    assert await names(observer) == ["first"]


@pytest.mark.parametrize("use", [prepared, commit])
async def test_what_cannot_be_encoded_leaves_what_was_ahead_of_it(
    connection: Any, observer: Connection, use: Use
) -> None:
    await connection.fetch("SELECT $1::int", 7)
    await connection.execute("BEGIN;")
    await connection.insert_ahead(INSERT, 2, "second")
    with pytest.raises(asyncpg.DataError):
        await connection.fetch("SELECT $1::int", "x")
    await use(connection)
    if use is not commit:
        await connection.execute("COMMIT;")
    assert (await names(observer))[:2] == ["first", "second"]


# Answers


async def test_a_notice_in_between_is_heard(connection: Any, observer: Connection) -> None:
    await observer.execute("""
        CREATE FUNCTION pipelined_note() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE NOTICE 'one more'; RETURN NEW; END $$;
        CREATE TRIGGER note BEFORE INSERT ON pipelined FOR EACH ROW EXECUTE FUNCTION pipelined_note();
    """)
    heard: list[str] = []
    connection.add_log_listener(lambda _, message: heard.append(message.message))
    async with connection.transaction():
        await connection.insert_ahead(INSERT, 2, "second")
        assert await connection.fetchval("SELECT count(*) FROM pipelined") == 2
    await asyncio.sleep(0)
    assert heard == ["one more"]
    await observer.execute("DROP FUNCTION pipelined_note CASCADE")


async def test_answers_may_come_byte_by_byte(database_url: str, table: None, observer: Connection) -> None:
    async with Proxy(database_url, at_once=1).opened() as wire, connected(wire.url) as connection:
        for number in range(3):
            async with connection.transaction():
                await connection.insert_ahead(INSERT, number, f"{number}")
                assert await connection.fetchval("SELECT count(*) FROM pipelined") == number + 1
        await connection.execute("BEGIN;")
        await connection.insert_ahead(INSERT, 1, "again")
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.fetch("SELECT 7")
        assert await is_usable(connection)
    assert await names(observer) == ["0", "1", "2"]


async def test_over_tls_under_uvloop_it_is_the_same(database_url: str, table: None) -> None:
    """Whose transports are others."""

    async def use(url: str) -> list[int]:
        async with Proxy(url, tls=True).opened() as wire:
            async with connected(wire.url, ssl=anonymous(ssl.PROTOCOL_TLS_CLIENT)) as connection:
                assert connection._transport.get_extra_info("cipher")
                counts = []
                for number in range(3):
                    async with connection.transaction():
                        await connection.insert_ahead(INSERT, number, "n" * 100_000)
                        counts.append(await connection.fetchval("SELECT sum(length(name)) FROM pipelined"))
                await connection.execute("BEGIN;")
                await connection.insert_ahead(INSERT, 1, "again")
                with pytest.raises(asyncpg.UniqueViolationError):
                    await connection.fetch("SELECT 7")
                assert await is_usable(connection)
                return counts

    assert await asyncio.to_thread(uvloop.run, use(database_url)) == [100_000, 200_000, 300_000]


async def test_who_uses_the_connection_in_between_ends_it_and_mixes_no_answers(connection: Any) -> None:
    other = asyncio.create_task(connection.fetchval("SELECT 8 FROM pg_sleep(0.1)"))
    await asyncio.sleep(0)
    await connection.execute("BEGIN;")
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await other
    assert connection.is_closed()


# Cancelled, or lost


@pytest.mark.parametrize("known", [False, True])
async def test_a_statement_cancelled_behind_a_begin_leaves_the_connection_usable(connection: Any, known: bool) -> None:
    if known:
        await connection.fetch("SELECT pg_sleep($1)", 0.0)
    await connection.execute("BEGIN;")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connection.fetch("SELECT pg_sleep($1)", 10.0), 0.05)
    assert await is_usable(connection)


async def test_a_begin_after_a_cancelled_statement_waits_for_its_end(connection: Any, observer: Connection) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connection.fetch("SELECT pg_sleep(10)"), 0.05)
    async with connection.transaction():
        await connection.insert_ahead(INSERT, 2, "second")
    assert await names(observer) == ["first", "second"]


async def test_a_cancelled_settling_does_not_lose_the_error(connection: Any, observer: Connection) -> None:
    """A simple query has what is ahead of it answered first."""
    await observer.execute("BEGIN; LOCK TABLE pipelined")
    await connection.execute("BEGIN;")
    await connection.insert_ahead(INSERT, 1, "again")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connection.execute("SELECT 7; SELECT 8"), 0.1)
    await observer.execute("COMMIT")
    with pytest.raises(asyncpg.PostgresError):
        await connection.fetch("SELECT 7")
    assert await is_usable(connection)


async def test_a_connection_lost_before_the_answer_is_an_error(database_url: str, table: None) -> None:
    async with Proxy(database_url).opened() as wire, connected(wire.url) as connection:
        await connection.fetch("SELECT 7")
        wire.flows.clear()
        await connection.execute("BEGIN;")
        waiting = asyncio.create_task(connection.fetch("SELECT 7"))
        await asyncio.sleep(0)
        wire.cut()
        with pytest.raises((asyncpg.ConnectionDoesNotExistError, ConnectionError)):
            await waiting
        assert connection.is_closed()
        with pytest.raises(asyncpg.InterfaceError):
            await connection.execute("BEGIN;")


# Inserting


async def test_values_are_as_the_driver_itself_would_have_them(connection: Any, observer: Connection) -> None:
    await observer.execute("""
        DROP TABLE IF EXISTS pipelined_values;
        CREATE TABLE pipelined_values (id uuid, at timestamptz, t text, i int, f float8, b boolean, j json)
    """)
    insert = "INSERT INTO pipelined_values VALUES ($1, $2, $3, $4, $5, $6, $7)"
    values = [
        (uuid4(), datetime.now(UTC), "é'\"\\ \n", -5, 1e-300, True, '{"a":  1}'),
        (uuid4(), datetime(2, 1, 1, tzinfo=UTC), "", 2**31 - 1, 0.1 + 0.2, False, "[]"),
        (None, None, None, None, None, None, None),
    ]
    for row in (values[0], *values):
        async with connection.transaction():
            await connection.insert_ahead(insert, *row)
    found = [tuple(row) for row in await observer.fetch("SELECT * FROM pipelined_values")]
    assert found == [values[0], *values]
    with pytest.raises(asyncpg.DataError, match="expected str"):
        await connection.insert_ahead(insert, *values[0][:-1], object())
    await observer.execute("DROP TABLE pipelined_values")


@pytest.mark.parametrize("setting", ["from the start", "later"])
async def test_text_goes_in_the_encoding_of_the_session(
    database_url: str, table: None, observer: Connection, setting: str
) -> None:
    options = {"server_settings": {"client_encoding": "latin1"}} if setting == "from the start" else {}
    async with connected(database_url, **options) as connection:
        await connection.insert_ahead(INSERT, 1, "é")
        await connection.execute("SET client_encoding = 'LATIN1'")
        async with connection.transaction():
            await connection.insert_ahead(INSERT, 2, "é")
    assert await names(observer) == ["é", "é"]


async def test_a_connection_keeps_so_many_statements_and_no_more(connection: Any, observer: Connection) -> None:
    for number in range(2, INSERTS + 5):
        async with connection.transaction():
            await connection.insert_ahead(f"INSERT /* {number} */ INTO pipelined VALUES ($1, $2)", number, "n")
    assert len(await names(observer)) == INSERTS + 4
    assert len(connection._inserts) == INSERTS


async def test_without_prepared_statements_it_is_answered_at_once(database_url: str, table: None) -> None:
    """As behind a pooler that gives each transaction another session."""
    async with connected(database_url, statement_cache_size=0) as connection:
        for number in (1, 2):
            async with connection.transaction():
                await connection.insert_ahead(INSERT, number, "n")
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.insert_ahead(INSERT, 1, "again")
        assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
