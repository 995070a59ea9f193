"""The shared read behind every wait: many keys of one mapped class in one autocommit query."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import ARRAY, Integer, and_, bindparam, column, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import Session, lazyload, undefer, with_polymorphic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sqlalchemy import Connection, Select
    from sqlalchemy.orm import Mapper

    from coord.target import ColumnNames, Key

    Fetch = Callable[[Connection, Select[Any], dict[str, Any]], Sequence[Sequence[Any]]]

CHUNK = 5_000
"""Keys in one query."""


@dataclass(frozen=True)
class Reader:
    """Reads rows of one mapped class for whoever waits for them: as the pool's role, outside any transaction.

    When `source` is a connection (a test's, rolled back at its end) it reads through that, in its transaction.
    """

    source: AsyncEngine | AsyncConnection
    mapper: Mapper[Any]
    schemas: Mapping[str | None, str | None] | None

    async def columns(self, keys: Sequence[Key], names: ColumnNames) -> dict[Key, dict[str, Any]]:
        """The named attributes of the rows that are there."""
        attributes = [getattr(self.mapper.class_, name) for name in names]
        rows = await self._rows(keys, self._select(self.mapper.class_, attributes), _fetch_columns)
        return {key: dict(zip(names, row[1:], strict=True)) for key, row in rows}

    async def entities(self, keys: Sequence[Key]) -> dict[Key, Any]:
        """The rows that are there, as detached instances with every column loaded and no relationship."""
        statement = self._select(self._entity, [self._entity]).options(lazyload("*"), undefer("*"))
        rows = await self._rows(keys, statement, _fetch_entities)
        return {key: row[1] for key, row in rows}

    async def _rows(
        self, keys: Sequence[Key], statement: Select[Any], fetch: Fetch
    ) -> Iterable[tuple[Key, Sequence[Any]]]:
        found: list[tuple[Key, Sequence[Any]]] = []
        if self.schemas:
            statement = statement.execution_options(schema_translate_map=self.schemas)
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            parameters = {f"keys_{n}": list(values) for n, values in enumerate(zip(*chunk, strict=True))}
            found += [(chunk[row[0] - 1], row) for row in await self._run(fetch, statement, parameters)]
        return found

    async def _run(self, fetch: Fetch, statement: Select[Any], parameters: dict[str, Any]) -> Sequence[Sequence[Any]]:
        if isinstance(self.source, AsyncConnection):
            return await self.source.run_sync(fetch, statement, parameters)
        async with self.source.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")  # asyncpg then sends the query alone
            return await connection.run_sync(fetch, statement, parameters)

    def _select(self, source: Any, entities: Sequence[Any]) -> Select[Any]:
        """PostgreSQL matches the keys, so its notion of equality counts; rows come with their key's position."""
        keys = self.mapper.primary_key
        arrays = [bindparam(f"keys_{n}", type_=ARRAY(key.type)) for n, key in enumerate(keys)]
        wanted = (
            func.unnest(*arrays)
            .table_valued(*(column(f"key_{n}", key.type) for n, key in enumerate(keys)), with_ordinality="position")
            .render_derived(name="wanted")
        )
        own = [getattr(source, self.mapper.get_property_by_column(key).key) for key in keys]
        match = and_(*(mine == wanted.c[f"key_{n}"] for n, mine in enumerate(own)))
        position = wanted.c.position.cast(Integer)
        return select(position, *entities).select_from(wanted).join(source, match)

    @cached_property
    def _entity(self) -> Any:
        """Of a class with subclasses, a row is loaded with the columns of its own class."""
        model = self.mapper.class_
        return model if self.mapper.polymorphic_on is None else with_polymorphic(model, "*")


def _fetch_columns(
    connection: Connection, statement: Select[Any], parameters: dict[str, Any]
) -> Sequence[Sequence[Any]]:
    return connection.execute(statement, parameters).all()


def _fetch_entities(
    connection: Connection, statement: Select[Any], parameters: dict[str, Any]
) -> Sequence[Sequence[Any]]:
    with Session(connection, join_transaction_mode="rollback_only", autoflush=False) as session:
        return session.execute(statement, parameters).all()


def is_passing(error: Exception) -> bool:
    """Whether the database is away or overloaded, as opposed to refusing this statement or its values."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, OSError | TimeoutError | PoolTimeoutError):
        return True
    if isinstance(original, asyncpg.InterfaceError):
        return not isinstance(original, ValueError)  # a key that the driver cannot encode
    return str(getattr(original, "sqlstate", ""))[:2] in {"08", "53", "57"}  # connection, resources, intervention
