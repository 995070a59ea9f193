"""The ledger's tables: printed, made, and brought up to date, by `coord schema` or by an application's start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    Table,
    create_mock_engine,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateSchema

from coord.database.lock_function import create_lock_function
from coord.database.place import ledger_schema, place_ledger
from coord.jobs.model import Ledger

versions = Table("coord_schema", Ledger.metadata, Column("version", Integer, primary_key=True, autoincrement=False))
# Rows change once and go by the thousand: vacuum by their number and not by the table's size (section 24.1.6).
_BY_NUMBER = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000"
_OF_FEW = "fillfactor = 50, autovacuum_vacuum_threshold = 200"
_STORAGE = {
    "coord_jobs": text(f"ALTER TABLE coord_jobs SET ({_BY_NUMBER}, autovacuum_analyze_scale_factor = 0.02)"),
    "coord_workers": text(f"ALTER TABLE coord_workers SET ({_OF_FEW})"),
    "coord_queues": text(f"ALTER TABLE coord_queues SET ({_OF_FEW})"),
}
"""Statements of their own, which Alembic leaves out, and SQLAlchemy 2.0 does not know in CREATE TABLE."""
_BESIDE: Sequence[Any] = (*_STORAGE.values(), create_lock_function)
"""What is the ledger's beside its tables."""
_KEY = 0x636F6F7264
"""The advisory lock under which the tables are changed; spells "coord"."""


_TO_2 = (
    "ALTER TABLE coord_jobs RENAME COLUMN attempts TO max_attempts",
    "ALTER TABLE coord_jobs RENAME COLUMN due_at TO scheduled_at",
    """
ALTER TABLE coord_jobs
    ADD COLUMN attempts integer,
    ADD COLUMN due_at timestamptz,
    ADD COLUMN uncounted integer NOT NULL DEFAULT 0,
    ADD COLUMN deaths integer NOT NULL DEFAULT 0,
    ADD COLUMN hand_backs integer NOT NULL DEFAULT 0,
    ADD COLUMN unknown_seconds double precision NOT NULL DEFAULT '0',
    ADD COLUMN priority integer NOT NULL DEFAULT 0,
    ADD COLUMN one_at_a_time text,
    ADD COLUMN turn integer
""",
    """
ALTER TABLE coord_workers
    ADD COLUMN tasks json NOT NULL DEFAULT '{}',
    ADD COLUMN stopping boolean NOT NULL DEFAULT false,
    ADD COLUMN dead boolean NOT NULL DEFAULT false
""",
    """
ALTER TABLE coord_cancellations
    ADD COLUMN id uuid NOT NULL DEFAULT gen_random_uuid(),
    DROP CONSTRAINT coord_cancellations_pkey,
    ADD CONSTRAINT coord_cancellations_pkey PRIMARY KEY (job_id, id)
""",
    """
CREATE FUNCTION coord_from_version_1() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.due_at IS NOT NULL THEN
        NEW.scheduled_at := NEW.due_at;
        NEW.max_attempts := coalesce(NEW.attempts, NEW.max_attempts);
        NEW.due_at := NULL;
        NEW.attempts := NULL;
    END IF;
    RETURN NEW;
END $$
""",
    """
CREATE TRIGGER coord_from_version_1 BEFORE INSERT OR UPDATE OF due_at, attempts ON coord_jobs
    FOR EACH ROW WHEN (NEW.due_at IS NOT NULL) EXECUTE FUNCTION coord_from_version_1()
""",
)
"""Renames take no time, and new columns with a constant default neither (PostgreSQL's manual, ALTER TABLE). What is
left under the old names, and the trigger, are for processes of version 1, which may still run; version 3 ends them."""
_NEW_IN_2 = ("coord_queues", "coord_attempts", "coord_schedules")
_INDEXES_IN_2 = ("coord_jobs_due", "coord_jobs_turn", "coord_jobs_waiting")


def _to_2(connection: Connection) -> None:
    """Renamed columns, priorities, what is known of deaths; queues, attempts, schedules.

    Locks the jobs for as long as it takes to index what is queued: see `docs/upgrade.md`.
    """
    connection.execute(create_lock_function)
    for statement in _TO_2:
        connection.execute(text(statement))
    tables = Ledger.metadata.tables
    for name in _NEW_IN_2:
        tables[name].create(connection)
    connection.execute(_STORAGE["coord_queues"])
    for index in tables["coord_jobs"].indexes:
        if index.name in _INDEXES_IN_2:
            index.create(connection)


STEPS: Sequence[Callable[[Connection], None]] = (_to_2,)
"""What each version from the second on changes in the one before; never changed once it was released."""


def latest() -> int:
    return 1 + len(STEPS)


async def create_ledger(connection: AsyncConnection, *, schema: str | None = None) -> None:
    """Make the ledger's tables, or bring those of an earlier version up to date; joins the connection's transaction.

    In the given schema, which is made if need be; without one where the ledger is, or else in the default schema. Every
    engine finds it there, whatever `schema_translate_map` a session has. Under an advisory lock until the transaction
    ends, so that any number of processes may start at once.

        async with engine.begin() as connection:
            await create_ledger(connection)
    """
    await connection.run_sync(_placed, schema)


def ddl(schema: str | None = None) -> str:
    """The statements that make the tables of this version in an empty database."""
    statements: list[str] = []

    def note(statement: Any, *_: Any, **__: Any) -> None:
        compiled = statement.compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})
        statements.append(f"{str(compiled).strip()};")

    engine = create_mock_engine("postgresql+asyncpg://", note)
    if schema is not None:
        note(CreateSchema(schema, if_not_exists=True))
        note(select(func.set_config("coord.search_path", func.current_setting("search_path"), False)))
        note(select(func.set_config("search_path", _quoted(schema), False)))
    Ledger.metadata.create_all(engine, checkfirst=False)
    for statement in (*_BESIDE, insert(versions).values(version=latest())):
        note(statement)
    if schema is not None:
        note(select(func.set_config("search_path", func.current_setting("coord.search_path"), False)))
    return "\n\n".join(statements)


def _quoted(schema: str) -> str:
    return str(postgresql.dialect().identifier_preparer.quote_identifier(schema))  # type: ignore[no-untyped-call]


def _placed(connection: Connection, given: str | None) -> None:
    """Whatever the connection translates."""
    translated = connection.get_execution_options().get("schema_translate_map")
    connection.execution_options(schema_translate_map=None)
    connection.execute(select(func.pg_advisory_xact_lock(_KEY)))
    schema = ledger_schema(connection) if given is None else given
    if schema is None:
        _upgrade(connection)
    else:
        if not inspect(connection).has_schema(schema):
            connection.execute(CreateSchema(schema))
        path = connection.scalar(select(func.current_setting("search_path")))
        connection.execute(select(func.set_config("search_path", _quoted(schema), True)))
        _upgrade(connection)
        connection.execute(select(func.set_config("search_path", path, True)))
        place_ledger(connection.dialect, None if schema == connection.dialect.default_schema_name else schema)
    connection.execution_options(schema_translate_map=translated)


def _upgrade(connection: Connection) -> None:
    versions.create(connection, checkfirst=True)
    version = connection.scalar(select(versions.c.version))
    if version is None:
        Ledger.metadata.create_all(connection)
        for statement in (*_BESIDE, insert(versions).values(version=latest())):
            connection.execute(statement)
        return
    if version > latest():
        raise RuntimeError(f"The ledger is of version {version}; this coord knows {latest()} and would harm it.")
    for step in STEPS[version - 1 :]:
        step(connection)
    if version < latest():
        connection.execute(update(versions).values(version=latest()))
