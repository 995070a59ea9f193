"""The shared read behind every wait: many keys of one mapped class in one autocommit query."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import ARRAY, Integer, and_, bindparam, column, func, select
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import lazyload, undefer, with_polymorphic
from sqlalchemy.pool import QueuePool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.orm import Mapper, Session

    from coord.postgresql.schemas import Schemas
    from coord.target import ColumnNames, Key

CHUNK = 5_000
"""Keys in one query."""
READ_LIMIT = 5.0
"""Seconds after which a read is given up, to be tried again: the server may be gone without a word."""
QUEUE_LIMIT = 30.0
"""Seconds more for one that has to queue for a connection, unless the pool has a `pool_timeout` of its own."""

PASSING = {"40001", "40P01", "55P03"}
"""What a role's own settings or somebody's table lock may answer to a plain SELECT."""


class Reader:
    """Reads rows of one mapped class for whoever waits for them: as the pool's role, outside any transaction.

    When `source` is a connection (a test's, rolled back at its end) it reads through that, in its transaction.
    """

    def __init__(self, source: AsyncEngine | AsyncConnection, mapper: Mapper[Any], schemas: Schemas) -> None:
        self.source = source
        self.mapper = mapper
        self._schemas = schemas

    async def columns(self, keys: Sequence[Key], names: ColumnNames) -> dict[Key, Sequence[Any]]:
        """The named attributes of the rows that are there, after each row's position among the keys."""
        return await self._rows(keys, _columns_statement(self.mapper, self._schemas, names))

    async def entities(self, keys: Sequence[Key]) -> dict[Key, Any]:
        """The rows that are there, as detached instances with every column loaded and no relationship."""
        rows = await self._rows(keys, _entity_statement(self.mapper, self._schemas))
        return {key: row[1] for key, row in rows.items()}

    @property
    def _limit(self) -> float:
        """Longer if it has to queue: who gives up a place in the pool's queue begins again at its end."""
        pool = self.source.pool if isinstance(self.source, AsyncEngine) else None
        if isinstance(pool, QueuePool) and 0 <= pool._max_overflow <= pool.overflow() and not pool.checkedin():
            return READ_LIMIT + (pool.timeout() or QUEUE_LIMIT)
        return READ_LIMIT

    async def _rows(self, keys: Sequence[Key], statement: Select[Any]) -> dict[Key, Sequence[Any]]:
        found: dict[Key, Sequence[Any]] = {}
        for chunk, parameters in _chunks(keys):
            session = AsyncSession(self.source, join_transaction_mode="rollback_only", autoflush=False)
            async with asyncio.timeout(self._limit):
                rows = await session.run_sync(self._fetch, statement, parameters)
            found.update((chunk[row[0] - 1], row) for row in rows)
        return found

    def _fetch(self, session: Session, statement: Select[Any], parameters: dict[str, Any]) -> Sequence[Sequence[Any]]:
        """All of it in one greenlet: checkout, query and return."""
        with session:
            if not isinstance(self.source, AsyncEngine):
                return session.execute(statement, parameters).all()
            # In AUTOCOMMIT asyncpg sends the query alone.
            connection = session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            try:
                return session.execute(statement, parameters).all()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    # PostgreSQL has prepared the statement and keeps its locks until the next one; asyncpg has not said
                    # that it is over if it could not encode the values.
                    connection.exec_driver_sql("SELECT 1")
                raise


def _chunks(keys: Sequence[Key]) -> Iterator[tuple[Sequence[Key], dict[str, Any]]]:
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK]
        yield chunk, _parameters(map(list, zip(*chunk, strict=True)))


def _parameters(values: Iterable[Any]) -> dict[str, Any]:
    return {f"keys_{n}": value for n, value in enumerate(values)}


@lru_cache(maxsize=256)  # making a statement takes as long as running it
def _columns_statement(mapper: Mapper[Any], schemas: Schemas, names: ColumnNames) -> Select[Any]:
    return _select(mapper, schemas, mapper.class_, [getattr(mapper.class_, name) for name in names])


@lru_cache(maxsize=256)
def _entity_statement(mapper: Mapper[Any], schemas: Schemas) -> Select[Any]:
    """Of a class with subclasses, a row is loaded with the columns of its own class."""
    entity: Any = mapper.class_ if mapper.polymorphic_on is None else with_polymorphic(mapper.class_, "*")
    return _select(mapper, schemas, entity, [entity]).options(lazyload("*"), undefer("*"))


def _select(mapper: Mapper[Any], schemas: Schemas, source: Any, entities: Sequence[Any]) -> Select[Any]:
    """Rows come with their key's position."""
    own = [getattr(source, mapper.get_property_by_column(key).key) for key in mapper.primary_key]
    wanted, match = _wanted(mapper, own)
    statement = select(wanted.c.position.cast(Integer), *entities).select_from(wanted).join(source, match)
    return statement.execution_options(schema_translate_map=dict(schemas)) if schemas else statement


def _wanted(mapper: Mapper[Any], own: Sequence[Any]) -> tuple[Any, ColumnElement[bool]]:
    """The keys as a table, and what matches them: PostgreSQL does, so its notion of equality counts."""
    keys = mapper.primary_key
    arrays = [bindparam(f"keys_{n}", type_=ARRAY(key.type)) for n, key in enumerate(keys)]
    wanted = (
        func.unnest(*arrays)
        .table_valued(*(column(f"key_{n}", key.type) for n, key in enumerate(keys)), with_ordinality="position")
        .render_derived(name="wanted")
    )
    return wanted, and_(*(mine == wanted.c[f"key_{n}"] for n, mine in enumerate(own)))


def is_passing(error: Exception) -> bool:
    """Whether the database is away or overloaded, as opposed to refusing this statement or its values."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, OSError | TimeoutError | PoolTimeoutError):
        return True
    if isinstance(original, asyncpg.InterfaceError):
        return not isinstance(original, ValueError)  # a key that the driver cannot encode
    if isinstance(original, AsyncAdapt_asyncpg_dbapi.InvalidCachedStatementError):
        return True  # the table was altered; SQLAlchemy prepares anew the next time
    state = str(getattr(original, "sqlstate", ""))
    return state in PASSING or state[:2] in {"08", "53", "57"}  # connection, resources, intervention
