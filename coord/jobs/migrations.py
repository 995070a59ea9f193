"""The ledger's tables: printed, made, and brought up to date, by `coord schema` or by an application's start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    Table,
    create_mock_engine,
    func,
    insert,
    select,
    text,
    update,
)

from coord.database.lock_function import create_lock_function
from coord.jobs.model import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection


_versions = Table("coord_schema", Ledger.metadata, Column("version", Integer, primary_key=True, autoincrement=False))
_KEY = 0x636F6F7264
"""The advisory lock under which the tables are changed; spells "coord"."""


_TO_2 = (
    """
ALTER TABLE coord_jobs RENAME COLUMN attempts TO max_attempts
""",
    """
ALTER TABLE coord_jobs RENAME COLUMN due_at TO scheduled_at
""",
    """
ALTER TABLE coord_jobs
    ADD COLUMN attempts integer,
    ADD COLUMN due_at timestamptz,
    ADD COLUMN uncounted integer NOT NULL DEFAULT 0,
    ADD COLUMN deaths integer NOT NULL DEFAULT 0,
    ADD COLUMN hand_backs integer NOT NULL DEFAULT 0,
    ADD COLUMN unknown_seconds double precision NOT NULL DEFAULT '0',
    ADD COLUMN priority integer NOT NULL DEFAULT 0,
    ADD COLUMN one_at_a_time text
""",
    """
ALTER TABLE coord_workers
    ADD COLUMN tasks json NOT NULL DEFAULT '{}',
    ADD COLUMN stopping boolean NOT NULL DEFAULT false,
    ADD COLUMN dead boolean NOT NULL DEFAULT false
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
_INDEXES_IN_2 = ("coord_jobs_due", "coord_jobs_one_at_a_time")


def _to_2(connection: Connection) -> None:
    """Renamed columns, priorities, what is known of deaths; queues, attempts, schedules.

    Locks the jobs for as long as it takes to index what is queued: see `docs/operation.md`, "Upgrading".
    """
    connection.execute(create_lock_function)
    for statement in _TO_2:
        connection.execute(text(statement))
    tables = Ledger.metadata.tables
    for name in _NEW_IN_2:
        tables[name].create(connection)
    for index in tables["coord_jobs"].indexes:
        if index.name in _INDEXES_IN_2:
            index.create(connection)


STEPS: Sequence[Callable[[Connection], None]] = (_to_2,)
"""What each version from the second on changes in the one before; never changed once it was released."""


def latest() -> int:
    return 1 + len(STEPS)


async def create_ledger(connection: AsyncConnection) -> None:
    """Make the ledger's tables, or bring those of an earlier version up to date; joins the connection's transaction.

    Under an advisory lock until the transaction ends, so that any number of processes may start at once.

        async with engine.begin() as connection:
            await create_ledger(connection)
    """
    await connection.run_sync(_upgrade)


def ddl() -> str:
    """The statements that make the tables of this version in an empty database."""
    statements: list[str] = []

    def note(statement: Any, *_: Any, **__: Any) -> None:
        compiled = statement.compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})
        statements.append(f"{str(compiled).strip()};")

    engine = create_mock_engine("postgresql+asyncpg://", note)
    Ledger.metadata.create_all(engine, checkfirst=False)
    note(create_lock_function)
    note(insert(_versions).values(version=latest()))
    return "\n\n".join(statements)


def _upgrade(connection: Connection) -> None:
    connection.execute(select(func.pg_advisory_xact_lock(_KEY)))
    _versions.create(connection, checkfirst=True)
    version = connection.scalar(select(_versions.c.version))
    if version is None:
        Ledger.metadata.create_all(connection)
        connection.execute(create_lock_function)
        connection.execute(insert(_versions).values(version=latest()))
        return
    if version > latest():
        raise RuntimeError(f"The ledger is of version {version}; this coord knows {latest()} and would harm it.")
    for step in STEPS[version - 1 :]:
        step(connection)
    if version < latest():
        connection.execute(update(_versions).values(version=latest()))
