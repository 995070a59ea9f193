"""The engine: what it costs a transaction that coord does not trust a commit after an error."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import coord.database.engine
from coord import get_transaction
from coord.database.engine import another, prepare
from tests.models import User
from tests.proxy import Proxy, Wire
from tests.serving import engine_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

ASKED = "SELECT 1"
"""What makes sure that PostgreSQL has not given a transaction up."""


@pytest.fixture
async def prepared(database_url: str) -> AsyncIterator[AsyncEngine]:
    """With one connection, which all transactions share."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    prepare(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
def statements(prepared: AsyncEngine) -> list[str]:
    """Those sent so far."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(prepared.sync_engine, "before_cursor_execute", note)
    return sent


async def fail(session: AsyncSession) -> None:
    """Inside a savepoint, so that the transaction goes on."""
    await session.execute(text("SELECT 2"))
    with pytest.raises(DBAPIError):
        async with get_transaction(session):
            await session.execute(text("SELECT 1 / 0"))


async def test_a_commit_is_asked_about_once_however_many_statements_have_failed(
    prepared: AsyncEngine, statements: list[str]
) -> None:
    async with AsyncSession(prepared) as session:
        await fail(session)
        await fail(session)
        await session.commit()
    assert statements.count(ASKED) == 1


async def test_a_commit_that_was_sent_as_sql_is_the_callers(prepared: AsyncEngine, tables: None) -> None:
    """As people send it before VACUUM: what is stored is no error afterwards."""
    async with AsyncSession(prepared) as session:
        await session.execute(insert(User).values(id=1, name=""))
        await session.execute(text("COMMIT"))
        await session.commit()
        assert await session.get(User, 1)


async def test_the_next_transaction_is_trusted_again(prepared: AsyncEngine, statements: list[str]) -> None:
    async with prepared.connect() as connection, AsyncSession(connection) as session:
        await fail(session)
        await session.commit()
        await connection.commit()
        assert statements.count(ASKED) == 1
        await session.execute(text("SELECT 2"))
        await session.commit()
        await connection.commit()
        assert statements.count(ASKED) == 1
        await fail(session)
        await connection.commit()
        assert statements.count(ASKED) == 2
        await fail(session)  # and the connection goes back to the pool
    async with AsyncSession(prepared) as session:
        await session.execute(text("SELECT 2"))
        await session.commit()
    assert statements.count(ASKED) == 2


async def test_an_engine_that_nothing_failed_on_is_not_listened_to(prepared: AsyncEngine) -> None:
    """Listening to an engine's commits would slow every statement of it down."""
    async with AsyncSession(prepared) as session:
        await fail(session)
        await session.commit()
    assert not prepared.sync_engine.dispatch.commit


async def test_a_commit_that_is_refused_leaves_no_transaction_in_the_pool(
    prepared: AsyncEngine, observer: Connection
) -> None:
    for _ in range(2):
        with pytest.raises(DBAPIError):
            async with AsyncSession(prepared) as session:
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                with suppress(DBAPIError):
                    await session.execute(text("SELECT 1 / 0"))
                await session.commit()
        state = await observer.fetchval("SELECT state FROM pg_stat_activity WHERE pid = $1", pid)
        assert state in (None, "idle")
        async with AsyncSession(prepared) as session:
            assert await session.scalar(text("SELECT 7")) == 7


async def test_engines_that_share_a_pool_are_prepared_once(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each that `execution_options()` makes, one for each tenant, would have every new connection asked again."""
    asked: list[Any] = []
    ask = coord.database.engine._set_connection_check

    async def noted(driver: Any) -> None:
        asked.append(driver)
        await ask(driver)

    monkeypatch.setattr(coord.database.engine, "_set_connection_check", noted)
    engine = create_async_engine(database_url)
    tenants = [engine.execution_options(schema_translate_map={None: name}) for name in ("acme", "bolt", "cone")]
    for tenant in tenants:
        prepare(tenant)
    for each in (engine, *tenants):
        async with each.connect() as connection:
            await connection.execute(text("SELECT 1"))
    assert len(asked) == 1
    await engine.dispose()


async def test_a_connection_is_set_up_once_though_its_engine_has_the_listeners_of_another(database_url: str) -> None:
    """A worker's own engine is made from the application's, whose pool's listeners it takes over."""
    sent: list[bytes] = []

    def note(_wire: Wire, data: bytes) -> bool:
        sent.append(data)
        return False

    async with Proxy(database_url).opened() as proxy, engine_at(proxy.url) as engine:
        prepare(engine)
        own = another(engine)
        prepare(own)
        proxy.on_request = note
        async with own.connect():
            pass
        await own.dispose()
    assert sum(b"client_connection_check_interval" in data for data in sent) == 1
