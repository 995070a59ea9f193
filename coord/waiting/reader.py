"""The shared read behind every wait: many rows of one mapped class by their keys, in one autocommit query."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.pool import QueuePool

from coord.database.schemas import Schemas
from coord.database.target import ColumnNames, Key, Target
from coord.retryable import sqlstate_of
from coord.waiting.statements import columns_of, comparisons_of, entity_of, identities_of, options_of, parameters_of

Found = dict[Key, Sequence[Any]]

MAX_KEYS_PER_QUERY = 5_000
READ_TIMEOUT_SECONDS = 5.0
"""After which a read is given up and repeated: the connection may be dead without an error."""
POOL_TIMEOUT_SECONDS = 30.0
"""Added for a read that may have to queue for a connection, unless the pool has a `pool_timeout` of its own."""
SET = text("SELECT set_config(:name, :value, true)")
Settings = tuple[tuple[str, str], ...]
"""PostgreSQL's settings and their values, by name."""


class Reader:
    """Reads rows of one mapped class for all their waits: as the pool's role, outside any transaction.

    With `settings`, in a transaction of its own that has them and is rolled back.
    """

    def __init__(
        self, engine: AsyncEngine, mapper: Mapper[Any], schemas: Schemas, settings: Settings | None = None
    ) -> None:
        self.engine = engine
        self.mapper = mapper
        self.schemas = schemas
        self.settings = settings
        self.has_identities = False
        """Whether `identities` was answered: PostgreSQL keeps none of a view's rows."""

    async def columns(self, keys: Sequence[Key], names: ColumnNames) -> Found:
        """The named attributes of the rows that are there, after each row's position among the keys."""
        return await self._rows(keys, partial(columns_of, self.mapper, names))

    async def entities(self, keys: Sequence[Key]) -> dict[Key, Any]:
        """The rows that are there, as detached instances with every column loaded and no relationship."""
        rows = await self._rows(keys, partial(entity_of, self.mapper))
        return {key: row[1] for key, row in rows.items()}

    async def identities(self, keys: Sequence[Key]) -> dict[Key, tuple[Any, ...]]:
        """Of the rows that are there, which version each is: an equal one has equal values in any session."""
        rows = await self._rows(keys, partial(identities_of, self.mapper))
        self.has_identities = True
        return {key: tuple(row[1:]) for key, row in rows.items()}

    async def stores(self, target: Target[Any], seen: Mapping[str, Any]) -> bool:
        """Whether these values, stored in the row's columns, are what is there."""
        for statement, parameters in comparisons_of(target, seen):
            async with asyncio.timeout(self._limit):
                rows = await AsyncSession(self.engine).run_sync(self._fetch, statement, parameters)
            if not rows or not rows[0][0]:
                return False
        return True

    @property
    def _limit(self) -> float:
        """Longer if it may have to queue: giving up means to begin again at the end of the pool's queue."""
        pool = self.engine.pool
        if isinstance(pool, QueuePool) and pool.overflow() >= 0 and not pool.checkedin():
            return READ_TIMEOUT_SECONDS + (pool.timeout() or POOL_TIMEOUT_SECONDS)
        return READ_TIMEOUT_SECONDS

    async def _rows(self, keys: Sequence[Key], statement: Callable[..., Select[Any]]) -> Found:
        # For an array PostgreSQL makes a plan each time, which takes longer than the rest.
        one = len(keys) == 1
        session = AsyncSession(self.engine, autoflush=False)
        async with asyncio.timeout(self._limit):
            rows = await session.run_sync(self._fetch, statement(one=one), parameters_of(self.mapper, keys, one=one))
        return {keys[row[0] - 1]: row for row in rows}

    def _fetch(self, session: Session, statement: Select[Any], parameters: dict[str, Any]) -> Sequence[Sequence[Any]]:
        """All of it in one greenlet: checkout, query and return."""
        with session:
            # In AUTOCOMMIT asyncpg sends the query alone; an engine that has it always would forget the settings.
            level = "READ COMMITTED" if self.settings else "AUTOCOMMIT"
            connection = session.connection(execution_options={"isolation_level": level})
            for name, value in self.settings or ():
                session.execute(SET, {"name": name, "value": value})
            try:
                options = options_of(self.mapper, self.schemas, connection)
                return session.execute(statement, parameters, execution_options=options).all()
            except DBAPIError as error:
                if not self.settings and not error.connection_invalidated:
                    # PostgreSQL has prepared the statement and keeps its locks until the next one; asyncpg has not said
                    # that it is over if it could not encode the values.
                    connection.exec_driver_sql("SELECT 1")
                raise

    def concerns_all_rows(self, error: Exception) -> bool:
        """A statement that PostgreSQL refuses whatever the values (class 42), or a hook of the application's.

        That is what other errors are where no values are read, of which one might be what cannot be.
        """
        of_a_hook = self.settings is None and not isinstance(error, DBAPIError)
        return of_a_hook or sqlstate_of(error).startswith("42")
