"""The driver beneath a session's connection, for the few statements whose round trips count."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.util import greenlet_spawn

from coord.postgresql.engine import note_failure

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from sqlalchemy import Connection, Executable

    from coord.postgresql.schemas import Schemas

T = TypeVar("T")

_DIALECT = PGDialect_asyncpg()  # type: ignore[no-untyped-call]


def turn(connection: Connection) -> asyncio.Lock:
    """To be held while the driver is spoken to, since whoever shares the connection may speak to it by SQLAlchemy."""
    lock: asyncio.Lock = _proxied(connection).dbapi_connection._execute_mutex  # pinned by tests/test_driver.py
    return lock


async def in_transaction(connection: Connection) -> asyncpg.Connection:
    """The driver's connection, inside its transaction.

    SQLAlchemy sends BEGIN with a transaction's first statement, and only with one of its own. When this is cancelled
    meanwhile, the connection is given up, as SQLAlchemy itself does with one whose statement was cancelled.
    """
    proxied = _proxied(connection)
    driver: Any = proxied.driver_connection
    if driver.is_in_transaction():
        return driver
    try:
        await proxied.dbapi_connection._start_transaction()  # pinned by tests/test_driver.py
    except connection.dialect.loaded_dbapi.Error as error:
        raise await translated(connection, "BEGIN", error) from error
    except BaseException:
        # Cancelled: it may have begun or not, and asyncpg takes it for begun ever after.
        await greenlet_spawn(connection.invalidate)
        raise
    if not driver.is_in_transaction():
        raise InvalidRequestError("This needs a transaction, and the connection is in AUTOCOMMIT mode.")
    return driver


async def fetch(
    connection: Connection, statement: Executable, schemas: Schemas, values: Mapping[str, Any]
) -> Sequence[Any]:
    """The rows of a statement of coord's own, in the connection's transaction; errors are SQLAlchemy's.

    It saves half of what SQLAlchemy itself takes, which hot paths pay once a job. Values go to the driver as they are.
    """
    return await _run(connection, statement, schemas, values, asyncpg.Connection.fetch)


async def insert(connection: Connection, statement: Executable, schemas: Schemas, values: Mapping[str, Any]) -> None:
    """The same for one row to be inserted; where the connection pipelines, an error may be the next statement's."""
    # A savepoint has to contain it: there it must be known whether it has failed.
    run = asyncpg.Connection.fetch if connection.in_nested_transaction() else _insert
    await _run(connection, statement, schemas, values, run)


async def _insert(driver: asyncpg.Connection, sql: str, *values: Any) -> None:
    # asyncpg has isinstance() say of each of its connections that it is one of any class of them.
    await getattr(driver, "insert_ahead", driver.fetch)(sql, *values)


async def _run(
    connection: Connection,
    statement: Executable,
    schemas: Schemas,
    values: Mapping[str, Any],
    run: Callable[..., Awaitable[T]],
) -> T:
    sql, parameters = _compiled(statement, schemas)
    given = [values.get(name, constant) for name, constant in parameters]
    try:
        async with turn(connection):
            return await run(await in_transaction(connection), sql, *given)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise await translated(connection, sql, error) from error
    except BaseException:
        # Cancelled: who goes on in spite of that must not commit what has failed, or was done after all.
        await greenlet_spawn(connection.invalidate)
        raise


@lru_cache(maxsize=256)
def _compiled(statement: Any, schemas: Schemas) -> tuple[str, Sequence[tuple[str, Any]]]:
    """With the names of its parameters in order, and what they are when they are none that is given."""
    under = {"schema_translate_map": dict(schemas), "render_schema_translate": True} if schemas else {}
    compiled = statement.compile(dialect=_DIALECT, **under)
    return str(compiled), [(name, compiled.binds[name].value) for name in compiled.positiontup]


async def translated(connection: Connection, sql: str, error: Exception) -> BaseException:
    """As SQLAlchemy would say it, without the values."""
    adapter = _proxied(connection).dbapi_connection
    closed = adapter.driver_connection.is_closed()
    base = connection.dialect.loaded_dbapi.Error
    try:
        adapter._handle_exception(error)
    except base as known:
        found: BaseException = DBAPIError.instance(
            sql, None, known, base, connection_invalidated=closed, dialect=connection.dialect
        )
    except Exception as unknown:  # noqa: BLE001 - it is returned
        found = unknown
    if closed:
        await greenlet_spawn(connection.invalidate, error)
    else:
        note_failure(connection)
    return found


def keeps_its_snapshot(connection: Connection) -> bool:
    """Whether all statements of a transaction see what its first one has seen: above READ COMMITTED."""
    level = _proxied(connection).dbapi_connection.isolation_level or connection.dialect.default_isolation_level or ""
    return level.replace("_", " ").upper() in ("REPEATABLE READ", "SERIALIZABLE")


def _proxied(connection: Connection) -> Any:
    return connection.connection
