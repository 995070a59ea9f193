"""The ledger's tables: made once however many make them, upgraded in place, printed as they are, indexed for use."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import pytest
from sqlalchemy import Connection, MetaData, event, func, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from coord import Job, JobState, create_ledger, enqueue, job_transaction, list_jobs, task_options
from coord.cli import main
from coord.jobs import migrations
from coord.jobs.ids import new_id
from coord.jobs.model import jobs
from coord.worker.maintenance.rows import QueuedJobs
from tests.ledger import a_task, committed, delivered
from tests.shop import dsn_of, empty_database
from tests.workers import a_state

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

TABLES = {"coord_jobs", "coord_workers", "coord_cancellations", "coord_idempotency_keys", "coord_schema"}
TABLES |= {"coord_queues", "coord_attempts", "coord_schedules"}


@contextlib.asynccontextmanager
async def database(database_url: str) -> AsyncIterator[tuple[AsyncEngine, asyncpg.Connection]]:
    """An empty one: an engine for it, and a connection outside it."""
    async with empty_database(database_url) as url:
        engine = create_async_engine(url, pool_size=20)
        observer = await asyncpg.connect(dsn_of(url))
        try:
            yield engine, observer
        finally:
            await observer.close()
            await engine.dispose()


async def make(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await create_ledger(connection)


async def described(observer: asyncpg.Connection, schema: str = "public") -> dict[str, list[tuple[Any, ...]]]:
    """Everything about the tables that PostgreSQL's catalogs tell."""
    queries = {
        "columns": """
            SELECT table_name, ordinal_position, column_name, data_type, character_maximum_length, is_nullable,
            column_default FROM information_schema.columns WHERE table_schema = $1 ORDER BY 1, 2
        """,
        "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = $1 ORDER BY 1, 2",
        "options": """
            SELECT relname, reloptions::text FROM pg_class
            WHERE relnamespace = quote_ident($1)::regnamespace AND relkind IN ('r', 'i') ORDER BY 1
        """,
        "constraints": """
            SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
            WHERE connamespace = quote_ident($1)::regnamespace ORDER BY 1, 2
        """,
        "functions": "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = quote_ident($1)::regnamespace",
    }
    found = {name: [tuple(row) for row in await observer.fetch(query, schema)] for name, query in queries.items()}
    return found | {
        "version": [tuple(row) for row in await observer.fetch(f'SELECT version FROM "{schema}".coord_schema')]
    }


# Making them


async def test_create_ledger_makes_the_tables_once(database_url: str) -> None:
    async with database(database_url) as (engine, observer):
        await make(engine)
        made = await described(observer)
        assert {row[0] for row in made["columns"]} == TABLES
        async with async_sessionmaker(engine)() as session:
            await enqueue(session, a_task)
            await session.commit()
        await make(engine)
        assert await described(observer) == made
        assert await observer.fetchval("SELECT count(*) FROM coord_jobs") == 1


async def test_create_ledger_joins_its_connections_transaction(database_url: str) -> None:
    async with database(database_url) as (engine, observer):
        with pytest.raises(ZeroDivisionError):
            async with engine.begin() as connection:
                await create_ledger(connection)
                raise ZeroDivisionError
        assert await observer.fetchval("SELECT to_regclass('coord_schema')") is None
        await make(engine)
        assert await observer.fetchval("SELECT to_regclass('coord_schema')") is not None


async def test_any_number_of_processes_may_make_them_at_once(database_url: str) -> None:
    async with database(database_url) as (engine, observer):
        await asyncio.gather(*(make(engine) for _ in range(20)))
        assert await observer.fetch("SELECT version FROM coord_schema") == [(migrations.latest(),)]


async def test_alembic_would_find_nothing_to_do(database_url: str) -> None:
    """With `Job.metadata` among its targets it compares that with the database: tables, columns, indexes."""
    async with database(database_url) as (engine, _):
        await make(engine)
        there = MetaData()
        async with engine.connect() as connection:
            await connection.run_sync(there.reflect)

    def shape(metadata: MetaData) -> dict[str, Any]:
        return {
            table.name: (
                {column.name: (column.type.compile(engine.dialect), column.nullable) for column in table.columns},
                {index.name: ([column.name for column in index.columns], index.unique) for index in table.indexes},
            )
            for table in metadata.sorted_tables
        }

    assert set(shape(there)) == TABLES
    assert shape(there) == shape(Job.metadata)


async def test_what_alembic_has_made_is_the_ledger(database_url: str) -> None:
    async with database(database_url) as (engine, observer):
        async with engine.begin() as connection:
            await connection.run_sync(Job.metadata.create_all)
        await make(engine)
        assert await observer.fetch("SELECT version FROM coord_schema") == [(migrations.latest(),)]


# Upgrading them


def _second(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE coord_jobs ADD COLUMN colour integer NOT NULL DEFAULT 5"))


async def test_a_later_version_upgrades_them_in_place_and_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with database(database_url) as (engine, observer):
        await make(engine)
        async with async_sessionmaker(engine)() as session:
            await enqueue(session, a_task)
            await session.commit()
        monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, _second))
        await asyncio.gather(*(make(engine) for _ in range(10)))
        assert await observer.fetch("SELECT version FROM coord_schema") == [(migrations.latest(),)]
        assert await observer.fetch("SELECT colour FROM coord_jobs") == [(5,)]
        monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, _second))
        with pytest.raises(DBAPIError, match="already exists"):
            await make(engine)
        assert await observer.fetch("SELECT version FROM coord_schema") == [(migrations.latest() - 1,)], (
            "a step that failed has counted"
        )


async def test_an_empty_database_is_made_as_it_is_now_without_the_steps(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, _second))
    async with database(database_url) as (engine, observer):
        await make(engine)
        assert await observer.fetch("SELECT version FROM coord_schema") == [(migrations.latest(),)]
        with pytest.raises(asyncpg.UndefinedColumnError):
            await observer.fetch("SELECT colour FROM coord_jobs")


OLD = Path(__file__).parent / "version_1.sql"


async def test_a_ledger_of_version_1_becomes_what_a_new_one_is(database_url: str) -> None:
    """But for what processes of that version still write, which a later version takes away."""
    async with database(database_url) as (engine, observer):
        await make(engine)
        new = await described(observer)
    async with database(database_url) as (engine, observer):
        await observer.execute(OLD.read_text())
        await make(engine)
        await observer.execute("DROP TRIGGER coord_from_version_1 ON coord_jobs")
        await observer.execute("ALTER TABLE coord_jobs DROP COLUMN due_at, DROP COLUMN attempts")
        old = await described(observer)

    def shape(found: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[str]]:
        """Whatever the order of columns, and what a constraint that nobody has named is called."""
        columns = [str((row[0], *row[2:])) for row in found["columns"]]
        constraints = [str((row[0], row[2])) for row in found["constraints"]]
        return {"columns": sorted(columns), "constraints": sorted(constraints), "version": [str(found["version"])]}

    assert shape(old) == shape(new)


async def test_what_version_1_has_written_and_goes_on_writing_is_kept(database_url: str) -> None:
    insert = """
        INSERT INTO coord_jobs (id, task, queue, arguments, attempts, due_at, created_at)
        VALUES (gen_random_uuid(), $1, 'default', '[[],{}]', 3, '2031-01-01Z', '2030-01-01Z')"""
    async with database(database_url) as (engine, observer):
        await observer.execute(OLD.read_text())
        await observer.execute(insert, "before")
        await make(engine)
        await observer.execute(insert, "after")
        await observer.execute("UPDATE coord_jobs SET attempt = 2, due_at = '2032-01-01Z' WHERE task = 'after'")
        rows = await observer.fetch("SELECT task, max_attempts, scheduled_at::text, attempt FROM coord_jobs ORDER BY 1")
        year = {row["task"]: row["scheduled_at"][:4] for row in rows}
        assert {row["task"]: row["max_attempts"] for row in rows} == {"after": 3, "before": 3}
        assert year == {"after": "2032", "before": "2031"}
        heartbeat = (
            "INSERT INTO coord_workers (id, queue, host, pid, jobs) VALUES (gen_random_uuid(), 'q', 'h', 1, '{}')"
        )
        await observer.execute(heartbeat)


async def test_the_ledger_of_a_newer_version_is_left_alone(database_url: str) -> None:
    async with database(database_url) as (engine, observer):
        await make(engine)
        await observer.execute("UPDATE coord_schema SET version = 99; DROP TABLE coord_cancellations")
        with pytest.raises(RuntimeError, match="version 99"):
            await make(engine)
        assert await observer.fetchval("SELECT to_regclass('coord_cancellations')") is None


# The command


@pytest.mark.parametrize("options", [[], ["--schema", "The Jobs"]], ids=["default", "own schema"])
async def test_what_coord_schema_prints_makes_what_it_applies(
    database_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.delenv("COORD_DATABASE_URL", raising=False)
    schema = options[-1] if options else "public"
    assert await asyncio.to_thread(main, ["schema", *options]) == 0
    printed = capsys.readouterr().out
    async with database(database_url) as (engine, observer), database(database_url) as (_, other):
        path = await observer.fetchval("SHOW search_path")
        await observer.execute(printed)
        assert await observer.fetchval("SHOW search_path") == path
        url = dsn_of(database_url).rsplit("/", 1)[0] + "/" + await other.fetchval("SELECT current_database()")
        arguments = ["schema", *options, "--apply", "--url", url.replace("postgresql://", "postgresql+asyncpg://")]
        for _ in range(2):
            assert await asyncio.to_thread(main, arguments) == 0
            assert capsys.readouterr().out == f"the ledger is of version {migrations.latest()}, in schema {schema}\n"
        found = await described(observer, schema)
        assert {row[0] for row in found["columns"]} == TABLES
        assert found == await described(other, schema)
        await make(engine)  # finds it where it is
        assert await described(observer, schema) == found
        assert await observer.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'coord_jobs'") == 1


async def test_coord_schema_takes_its_database_from_the_environment(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with empty_database(database_url) as url:
        monkeypatch.setenv("COORD_DATABASE_URL", url)
        assert await asyncio.to_thread(main, ["schema", "--apply"]) == 0
        observer = await asyncpg.connect(dsn_of(url))
        assert {row[0] for row in (await described(observer))["columns"]} == TABLES
        await observer.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (None, "COORD_DATABASE_URL"),
        ("", "COORD_DATABASE_URL"),
        ("nonsense", "malformed"),
        ("postgresql+asyncpg://u:secret@host:notaport/db", "malformed"),
        ("postgresql://u:secret@127.0.0.1:1/x", r"postgresql\+asyncpg"),
        ("mysql+aiomysql://u:secret@127.0.0.1:1/x", r"postgresql\+asyncpg"),
        ("sqlite+aiosqlite://", r"postgresql\+asyncpg"),
        ("postgresql+asyncpg://u:secret@127.0.0.1:1/x", "127.0.0.1:1.*(refused|failed)"),
        ("postgresql+asyncpg://u:secret@no-such-host.invalid/x", "no-such-host.invalid"),
    ],
)
async def test_a_database_that_cannot_be_used_is_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str | None, says: str
) -> None:
    monkeypatch.delenv("COORD_DATABASE_URL", raising=False)
    if url is not None:
        monkeypatch.setenv("COORD_DATABASE_URL", url)
    assert await asyncio.to_thread(main, ["schema", "--apply"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")
    assert "secret" not in said.err
    assert re.search(says, said.err), said.err


async def test_a_database_that_refuses_is_one_line_in_postgresqls_own_words(
    database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = database_url.rsplit("/", 1)[0] + "/no_such_database"
    assert await asyncio.to_thread(main, ["schema", "--apply", "--url", url]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert 'database "no_such_database" does not exist' in said
    assert "Background on this error" not in said


# What the tables refuse


@pytest.mark.usefixtures("ledger")
@pytest.mark.parametrize("state", ["running", "", "QUEUED", "nonsense"])
async def test_the_ledger_holds_no_other_state(engine: AsyncEngine, state: str) -> None:
    await committed(async_sessionmaker(engine))
    async with engine.connect() as connection:
        with pytest.raises(IntegrityError, match="coord_jobs_state"):
            await connection.execute(text("UPDATE coord_jobs SET state = :state"), {"state": state})


def test_every_state_but_running_is_one_of_the_ledgers() -> None:
    stored = {state for state in JobState if state is not JobState.RUNNING}
    assert {str(state) for state in stored} == {"queued", "done", "failed", "cancelled"}
    assert {state for state in JobState if state.is_final} == {JobState.DONE, JobState.FAILED, JobState.CANCELLED}


def test_ids_are_uuids_of_version_7_in_the_order_of_time() -> None:
    made = [new_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert {(id_.version, id_.variant) for id_ in made} == {(7, "specified in RFC 4122")}
    assert made == sorted(made)
    assert abs((made[0].int >> 80) / 1000 - time.time()) < 5


# What is read


class Statement(NamedTuple):
    sql: str
    parameters: Sequence[Any]


@contextlib.contextmanager
def caught(engine: AsyncEngine) -> Iterator[list[Statement]]:
    """What is executed until the block ends, as PostgreSQL gets it."""
    seen: list[Statement] = []

    def note(_connection: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        seen.append(Statement(sql, parameters))

    def note_driver(query: Any) -> None:
        if query.args:
            seen.append(Statement(query.query, query.args))

    def checked_out(dbapi_connection: Any, *_: Any) -> None:
        dbapi_connection.driver_connection.remove_query_logger(note_driver)
        dbapi_connection.driver_connection.add_query_logger(note_driver)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    event.listen(engine.sync_engine, "checkout", checked_out)  # what passes SQLAlchemy by the driver logs
    try:
        yield seen
    finally:
        event.remove(engine.sync_engine, "checkout", checked_out)
        event.remove(engine.sync_engine, "before_cursor_execute", note)


async def hot_statements(engine: AsyncEngine) -> dict[str, Statement]:
    """Those that are executed for ever, while the ledger grows; nothing of it is committed."""
    session_maker = async_sessionmaker(engine)
    job = await committed(session_maker, task_options(a_task, unique_key="k"), 1)
    async with session_maker() as session:
        for n in range(300):
            await enqueue(session, a_task, n)
        await session.commit()
    with caught(engine) as seen:
        with contextlib.suppress(ZeroDivisionError):
            async with job_transaction(delivered(job, session_maker)):
                raise ZeroDivisionError
        async with session_maker() as session:
            await enqueue(session, task_options(a_task, unique_key="k"), 1)
        queued = QueuedJobs(a_state(engine))
        await queued.ids(jobs.c.scheduled_at <= func.now() - timedelta(seconds=1))
        async with session_maker() as session:
            await list_jobs(session, state="failed", limit=1)
    assert len(seen) == 4
    return dict(zip(("claim", "unique key", "reconciler", "failed"), seen, strict=True))


async def finish(observer: asyncpg.Connection, count: int) -> None:
    """As many jobs as that, of which one in five hundred has failed."""
    await observer.execute(
        """
        INSERT INTO coord_jobs (id, task, queue, arguments, state, unique_key, finished_at)
        SELECT (lpad(to_hex(n), 12, '0') || '7' || substr(md5(n::text), 1, 19))::uuid, 'a_task', 'default', '[[1],{}]',
            CASE WHEN n % 500 = 0 THEN 'failed' ELSE 'done' END, 'k' || n % 50, now()
        FROM generate_series((SELECT count(*) FROM coord_jobs WHERE state <> 'queued') + 1, $1::int) AS n
        """,
        count,
    )
    await observer.execute("VACUUM ANALYZE coord_jobs")  # as autovacuum does after 5,000 of them


async def plan_of(observer: asyncpg.Connection, statement: Statement, *, generic: bool) -> dict[str, Any]:
    """What it reads, run and undone. SQLAlchemy's statements are prepared, so PostgreSQL may plan them once for all."""
    literals = ", ".join("NULL" if value is None else f"'{value}'" for value in statement.parameters)
    arguments = f"({literals})" if literals else ""
    mode = "force_generic_plan" if generic else "force_custom_plan"
    transaction = observer.transaction()
    await transaction.start()
    await observer.execute(f"SET LOCAL plan_cache_mode = {mode}; PREPARE it AS {statement.sql}")
    found = await observer.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE it {arguments}")
    await transaction.rollback()
    await observer.execute("DEALLOCATE it")
    plan: dict[str, Any] = json.loads(found)[0]["Plan"]
    return plan


def parts(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from parts(part)


A_FEW_PAGES = 8
"""By which the levels of an index, and what vacuum has left, may differ."""


def buffers(plan: dict[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def test_what_has_finished_costs_what_is_to_be_done_nothing(database_url: str) -> None:
    indexes = {
        "claim": {"coord_jobs_queued", "coord_cancellations_pkey"},
        "unique key": {"coord_jobs_unique"},
        "reconciler": {"coord_jobs_due", "coord_jobs_queued"},
        "failed": {"coord_jobs_failed"},
    }
    async with database(database_url) as (engine, observer):
        await make(engine)
        statements = await hot_statements(engine)
        read: dict[int, dict[tuple[str, bool], int]] = {}
        for count in (2_000, 200_000):
            await finish(observer, count)
            plans = {
                (name, generic): await plan_of(observer, statement, generic=generic)
                for name, statement in statements.items()
                for generic in (False, True)
            }
            read[count] = {key: buffers(plan) for key, plan in plans.items()}
        for (name, _), plan in plans.items():
            used = {part["Index Name"] for part in parts(plan) if "Index Name" in part}
            assert used, json.dumps(plan, indent=1)
            assert used <= indexes[name], json.dumps(plan, indent=1)
            assert "Seq Scan" not in {part["Node Type"] for part in parts(plan)}
        for key, few in read[2_000].items():
            assert read[200_000][key] <= 2 * few + A_FEW_PAGES, (key, read)
