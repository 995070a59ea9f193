"""What coord reads of SQLAlchemy that is not its public interface: a change there shall fail here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord.transaction import _orm_has_flushed, _own_savepoints, _savepoints, connection_in_use, end_transaction
from tests.models import User

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
