"""What coord reads of SQLAlchemy that is not its public interface: a change there shall fail here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from coord import WaitTimeoutError, wait_for_row_change
from coord.postgresql.schemas import schemas_in_use
from coord.postgresql.transaction import (
    _orm_has_flushed,
    _own_savepoints,
    _savepoints,
    connection_in_use,
    connection_of,
    end_transaction,
)
from tests.models import Item, User

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.usefixtures("tables")


async def test_an_autobegun_transaction_has_no_connection_before_its_first_statement(
    session_maker: async_sessionmaker[AsyncSession],
) -> None:
    async with session_maker() as session:
        assert not connection_in_use(session.sync_session)
        session.add(User(id=1))
        assert session.in_transaction()
        assert not connection_in_use(session.sync_session)
        await session.flush()
        assert connection_in_use(session.sync_session)


async def test_a_savepoint_begins_with_its_first_statement(session_maker: async_sessionmaker[AsyncSession]) -> None:
    async with session_maker.begin() as session:
        await session.execute(select(User))
        outer = connection_in_use(session.sync_session)
        assert outer is not None
        async with session.begin_nested():
            assert connection_in_use(session.sync_session) is outer
            assert not outer.in_nested_transaction()
            assert await connection_of(session) is outer
            assert outer.in_nested_transaction()
        assert await connection_of(session) is outer


async def test_the_connection_is_that_of_the_sessions_own_bind(engine: AsyncEngine, database_url: str) -> None:
    """Which may have to be made, although the session has one of another."""
    other = create_async_engine(database_url)
    translated = engine.execution_options(schema_translate_map={None: "nowhere"})
    for own, another in ((other, engine), (engine, translated)):
        async with async_sessionmaker(own, binds={Item: another})() as session:
            await session.execute(
                select(Item) if another is engine else text("SELECT 1"), bind_arguments={"mapper": Item}
            )
            assert connection_in_use(session.sync_session) is None
            assert schemas_in_use(session.sync_session) == ()
            connection = await connection_of(session)
            assert connection.engine is own.sync_engine
            assert await connection_of(session) is connection is connection_in_use(session.sync_session)
    await other.dispose()


async def test_a_wait_in_a_savepoint_without_a_statement(session_maker: async_sessionmaker[AsyncSession]) -> None:
    async with session_maker.begin() as session:
        session.add(User(id=1))
    async with session_maker.begin() as session:
        await session.execute(select(User))
        async with session.begin_nested():
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, User, 1, timeout=0)


async def test_ending_a_transaction_frees_its_connection_and_keeps_the_sessions_state(
    session_maker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with session_maker() as session:
        session.add(User(id=1, name="loaded"))
        await session.commit()
        loaded = await session.scalar(select(User))
        assert loaded is not None
        loaded.name = "changed"
        pending = User(id=2)
        session.add(pending)
        await end_transaction(session)
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert not session.in_transaction()
        assert loaded in session.dirty
        assert pending in session.new
        await session.commit()
        assert (await session.scalars(select(User.name).order_by(User.id))).all() == ["changed", ""]


async def test_savepoints_are_counted_and_flushes_remembered(engine: AsyncEngine) -> None:
    async with engine.connect() as connection, connection.begin() as outer:
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            assert (_savepoints(connection), _own_savepoints(session)) == (0, 0)
            user = User(id=1)
            session.add(user)
            await session.flush()
            assert _orm_has_flushed(session)
            assert (_savepoints(connection), _own_savepoints(session)) == (1, 0)
            async with session.begin_nested(), session.begin_nested():
                await session.connection()  # which sends the savepoints; has_written begins with it
                assert (_savepoints(connection), _own_savepoints(session)) == (3, 2)
            await session.commit()
            assert not _orm_has_flushed(session)
        await outer.rollback()
