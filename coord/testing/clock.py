"""PostgreSQL's clock, moved on for one transaction: `now()` and its like, as functions that are found first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import DateTime, bindparam, func, select, text

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

_FUNCTION = """
CREATE OR REPLACE FUNCTION coord_clock.{}() RETURNS timestamptz LANGUAGE sql {} AS $$
    SELECT pg_catalog.{}() + make_interval(secs => current_setting('coord_clock.ahead')::double precision)
$$
"""
_INSTALL = (
    text("CREATE SCHEMA IF NOT EXISTS coord_clock"),
    text(_FUNCTION.format("now", "STABLE", "statement_timestamp")),
    text(_FUNCTION.format("transaction_timestamp", "STABLE", "statement_timestamp")),
    text(_FUNCTION.format("statement_timestamp", "STABLE", "statement_timestamp")),
    text(_FUNCTION.format("clock_timestamp", "VOLATILE", "clock_timestamp")),
)
_PATH = select(func.current_setting("search_path"))
_SEARCH = text("SELECT set_config('search_path', :path, true)")
_MOVE = text(
    "SELECT set_config('coord_clock.ahead', extract(epoch FROM :moment - pg_catalog.statement_timestamp())::text, true)"
).bindparams(bindparam("moment", type_=DateTime(timezone=True)))


class Clock:
    """The clock that statements of one connection see."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._path: str | None = None

    async def now(self) -> datetime:
        found: datetime = (await self._connection.execute(select(func.statement_timestamp()))).scalar_one()
        return found

    async def move_to(self, moment: datetime) -> None:
        """From now on it is that moment and later."""
        path: str = (await self._connection.execute(_PATH)).scalar_one()
        if self._path is None:
            for statement in _INSTALL:
                await self._connection.execute(statement)
            self._path = path
        if "coord_clock" not in path:  # a task that sets another sets it for all that comes after it
            # pg_catalog is searched first unless it is named (section 5.10.5 of PostgreSQL's manual).
            found_first = ", ".join(part for part in (path, "coord_clock", "pg_catalog") if part)
            await self._connection.execute(_SEARCH, {"path": found_first})
        await self._connection.execute(_MOVE, {"moment": moment})

    async def restore(self) -> None:
        """What was installed goes when the connection's transaction is rolled back."""
        if self._path is not None:
            await self._connection.execute(_SEARCH, {"path": self._path})
