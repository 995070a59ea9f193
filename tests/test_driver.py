"""What coord does beneath SQLAlchemy leaves SQLAlchemy's connections as it expects them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy import bindparam, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine

from coord.postgresql.driver import fetch, in_transaction
from tests.models import User
from tests.proxy import Proxy
from tests.serving import eventually

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy import Connection as SyncConnection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


def beneath(connection: AsyncConnection) -> SyncConnection:
    assert connection.sync_connection is not None
    return connection.sync_connection


async def test_a_transaction_is_begun_once_and_is_sqlalchemys(engine: AsyncEngine, observer: Connection) -> None:
    async with engine.connect() as connection:
        driver = await in_transaction(beneath(connection))
        assert driver.is_in_transaction()
        assert await in_transaction(beneath(connection)) is driver
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        state = "SELECT state FROM pg_stat_activity WHERE pid = $1"
        assert await observer.fetchval(state, pid) == "idle in transaction"
        await connection.rollback()
        assert await observer.fetchval(state, pid) == "idle"
        assert (await in_transaction(beneath(connection))).is_in_transaction()


async def test_autocommit_is_refused(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(InvalidRequestError, match="AUTOCOMMIT"):
            await in_transaction(beneath(connection))


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("how", ["anyio", "task"])
async def test_a_cancelled_begin_spoils_no_connection(database_url: str, observer: Connection, how: str) -> None:
    """asyncpg would take it for begun ever after: what is committed by it then would be the release of a savepoint."""
    async with Proxy(database_url).opened() as way:
        engine = create_async_engine(way.url, pool_size=1, max_overflow=0)
        async with engine.connect() as connection, connection.begin():
            assert await connection.scalar(text("SELECT 1")) == 1
        async with engine.connect() as connection:
            await connection.begin()
            way.flows.clear()
            asyncio.get_running_loop().call_later(0.2, way.flows.set)
            if how == "anyio":
                with anyio.move_on_after(0.05):
                    await in_transaction(beneath(connection))
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(in_transaction(beneath(connection)), 0.05)
        async with engine.connect() as connection, connection.begin():
            await connection.execute(text("INSERT INTO users (name) VALUES ('Ada')"))
        assert await observer.fetchval("SELECT name FROM users") == "Ada"
        await engine.dispose()


async def test_a_connection_that_was_lost_is_known_as_lost(single: AsyncEngine, observer: Connection) -> None:
    async with single.connect() as connection, connection.begin():
        driver = await in_transaction(beneath(connection))
    assert await observer.fetchval("SELECT pg_terminate_backend($1)", driver.get_server_pid())
    await eventually(lambda: asyncio.sleep(0, driver.is_closed()))
    async with single.connect() as connection:
        with pytest.raises(DBAPIError) as caught:
            async with connection.begin():
                await in_transaction(beneath(connection))
    assert caught.value.connection_invalidated
    async with single.connect() as connection, connection.begin():
        assert (await in_transaction(beneath(connection))).is_in_transaction()


async def test_errors_are_sqlalchemys(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        with pytest.raises(ProgrammingError, match="nowhere"):
            await fetch(beneath(connection), text("SELECT * FROM nowhere"), (), {})


@pytest.mark.usefixtures("tables")
async def test_values_are_given_by_name(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("INSERT INTO users (name) VALUES ('Ada'), ('Grace')"))
        statement = select(User.name).where(User.name == bindparam("who"))
        assert [tuple(row) for row in await fetch(beneath(connection), statement, (), {"who": "Ada"})] == [("Ada",)]
