"""The driver beneath a session's connection, for the few statements whose round trips count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import InvalidRequestError

if TYPE_CHECKING:
    import asyncpg
    from sqlalchemy.ext.asyncio import AsyncConnection


async def in_transaction(connection: AsyncConnection) -> tuple[asyncpg.Connection, bool]:
    """The driver's connection inside its transaction, and whether that was begun just now.

    SQLAlchemy sends BEGIN with a transaction's first statement, and only with one of its own.
    """
    proxied = _proxied(connection)
    driver: Any = proxied.driver_connection
    if driver.is_in_transaction():
        return driver, False
    await proxied.dbapi_connection._start_transaction()  # pinned by tests/test_driver.py
    if not driver.is_in_transaction():
        raise InvalidRequestError("This needs a transaction, and the connection is in AUTOCOMMIT mode.")
    return driver, True


def keeps_its_snapshot(connection: AsyncConnection) -> bool:
    """Whether all statements of a transaction see what its first one has seen: above READ COMMITTED."""
    level = _proxied(connection).dbapi_connection.isolation_level or connection.dialect.default_isolation_level or ""
    return level.replace("_", " ").upper() in ("REPEATABLE READ", "SERIALIZABLE")


def _proxied(connection: AsyncConnection) -> Any:
    assert connection.sync_connection is not None
    return connection.sync_connection.connection
