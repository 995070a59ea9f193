"""The ledger's tables: are they there, of this version, whole, and this user's to write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select, text

from coord.cli.checks.finding import Finding, Setup
from coord.jobs.migrations import latest, versions
from coord.jobs.model import Ledger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

APPLY = "coord schema --apply"
MANY_DEAD_ROWS = 50_000
_INDEXES = text("""
    SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = ANY (CAST(CAST(:tables AS text[]) AS regclass[])) AND indisvalid
""")
_DEAD = text("""
    SELECT relname, n_dead_tup, n_live_tup, last_autovacuum FROM pg_stat_user_tables
    WHERE relid = ANY (CAST(CAST(:tables AS text[]) AS regclass[])) AND n_dead_tup > :many AND n_dead_tup > n_live_tup
""")
_REFUSED = text("""
    SELECT name, privilege FROM unnest(CAST(:tables AS text[])) AS name,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
    WHERE NOT has_table_privilege(name, privilege)
""")


async def tables(setup: Setup) -> AsyncIterator[Finding]:
    place = "" if setup.schema is None else setup.engine.dialect.identifier_preparer.quote_schema(setup.schema) + "."
    names = [place + table.name for table in Ledger.metadata.sorted_tables]
    async with setup.engine.connect() as connection:
        if await connection.scalar(select(func.to_regclass(place + versions.name))) is None:
            yield Finding("ledger", "its tables are missing", APPLY)
            return
        version = await connection.scalar(select(versions.c.version))
        if version != latest():
            its = "its version is not recorded" if version is None else f"it is of version {version}"
            what = f"{its}, and this coord knows {latest()}"
            older = version is None or version < latest()
            yield Finding("ledger", what, APPLY if older else "upgrade coord: this one would harm the ledger")
            return
        there = set(await connection.scalars(_INDEXES, {"tables": names}))
        wanted = {str(index.name) for table in Ledger.metadata.tables.values() for index in table.indexes}
        if missing := sorted(wanted - there):
            what = f"without {', '.join(missing)} every look at what is due reads the whole table"
            yield Finding("indexes", what, f"CREATE INDEX as `coord schema` prints it: {missing[0]}")
        function = func.to_regprocedure(f"{place}coord_lock(text, text[], double precision)")
        if await connection.scalar(select(function)) is None:
            what = "coord_lock is missing: each lock takes six round trips, two of them while the table is locked"
            yield Finding("function", what, "run the CREATE FUNCTION that `coord schema` prints")
        own = names[:]
        own.remove(place + versions.name)
        if refused := (await connection.execute(_REFUSED, {"tables": own})).all():
            what = f"this user may not {refused[0].privilege} {refused[0].name}"
            yield Finding("rights", what, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(own)}")
        for row in await connection.execute(_DEAD, {"tables": names, "many": MANY_DEAD_ROWS}):
            what = f"{row.relname} has {row.n_dead_tup} dead rows and {row.n_live_tup} live ones"
            yield Finding(
                "bloat", what, "end old transactions (coord locks), then VACUUM; see that autovacuum keeps up"
            )
