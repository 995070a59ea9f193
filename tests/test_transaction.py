"""What a session's transaction is and holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, insert, literal, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from coord import WaitTimeoutError, wait_for_row_change
from coord.database.transaction import connection_in_use, end_transaction, has_written
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


def test_a_session_on_a_connection_of_another_database_is_left_alone() -> None:
    """coord listens to every session of the process, and PostgreSQL's questions are not for SQLite."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection, Session(connection) as session:
        assert session.scalar(select(literal(1))) == 1
        with session.begin_nested():
            assert session.scalar(select(literal(2))) == 2
        session.commit()
    engine.dispose()


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


MODES: list[Any] = ["create_savepoint", "rollback_only", "control_fully"]


@pytest.mark.parametrize("mode", MODES)
async def test_what_a_session_on_a_shared_connection_has_written_counts_from_its_last_commit(
    engine: AsyncEngine, mode: Any
) -> None:
    """As a test's session does, whose transaction is rolled back at the end and has others' rows in it already."""
    async with engine.connect() as connection, connection.begin() as outer:
        await connection.execute(insert(User).values(name="of the test's own"))
        async with AsyncSession(connection, join_transaction_mode=mode, expire_on_commit=False) as session:
            await session.execute(select(User))
            assert not await has_written(session)
            session.add(User(name="flushed"))
            await session.flush()
            assert await has_written(session)
            if mode == "control_fully":
                return
            await session.commit()
            await session.execute(select(User))
            assert not await has_written(session)
        await outer.rollback()


@pytest.mark.parametrize("how", ["of its own", "inside a savepoint"])
async def test_raw_sql_of_a_session_on_a_shared_connection_is_seen_in_its_savepoint(
    engine: AsyncEngine, how: str
) -> None:
    async with engine.connect() as connection, connection.begin() as outer:
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            statement = text("INSERT INTO users (name) VALUES ('raw')")
            if how == "of its own":
                await session.execute(statement)
            else:
                await session.begin_nested()
                await session.execute(statement)
            assert await has_written(session)
        await outer.rollback()


async def test_closing_a_transaction_is_still_a_method_of_it(session_maker: async_sessionmaker[AsyncSession]) -> None:
    """`SessionTransaction.close`, which SQLAlchemy has no documentation of."""
    async with session_maker() as session:
        await session.execute(select(User))
        transaction = session.sync_session.get_transaction()
        assert transaction is not None
        await session.run_sync(lambda _: transaction.close())
        assert not session.in_transaction()
