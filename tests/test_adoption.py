"""The row that ends a wait is the session's own, current as after its `refresh`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import ForeignKey, TypeDecorator, event, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from coord import Coordinator, WaitTimeoutError, wait_for_row_change, watch_row
from tests.models import User
from tests.serving import all_given_back
from tests.waits import registered, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "orders", "nobody_left_waiting", "read_settings")


class Base(DeclarativeBase):
    pass


class Line(Base):
    __tablename__ = "adopted_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    eager_id: Mapped[int | None] = mapped_column(ForeignKey("adopted_eager.id"))
    lazy_id: Mapped[int | None] = mapped_column(ForeignKey("adopted_lazy.id"))


class Eager(Base):
    __tablename__ = "adopted_eager"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    note: Mapped[str] = mapped_column(default="")
    lines: Mapped[list[Line]] = relationship(lazy="selectin", order_by=Line.id)


class Lazy(Base):
    __tablename__ = "adopted_lazy"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(JSONB()))
    secret: Mapped[str] = mapped_column(deferred=True)
    lines: Mapped[list[Line]] = relationship(order_by=Line.id)


@dataclass
class Options:
    dark: bool


class OptionsType(TypeDecorator[Options]):
    impl = JSONB
    cache_ok = True

    def process_bind_param(self, value: Options | None, dialect: Any) -> dict[str, Any] | None:
        return None if value is None else asdict(value)

    def process_result_value(self, value: Any, dialect: Any) -> Options | None:
        return None if value is None else Options(**value)


class Chosen(Base):
    __tablename__ = "adopted_chosen"
    id: Mapped[int] = mapped_column(primary_key=True)
    options: Mapped[Options] = mapped_column(OptionsType())


@pytest.fixture(scope="module")
async def made(engine: AsyncEngine) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


@pytest.fixture
async def orders(made: None, observer: Connection) -> None:
    await observer.execute("""
        TRUNCATE adopted_lines, adopted_eager, adopted_lazy, adopted_chosen;
        INSERT INTO adopted_eager VALUES (1, 'pending', '');
        INSERT INTO adopted_lazy VALUES (1, 'pending', '{"n": 1}', 'a');
        INSERT INTO adopted_lines VALUES (1, 1, 1);
        INSERT INTO adopted_chosen VALUES (1, '{"dark": false}')
    """)


WORK = """
    INSERT INTO adopted_lines VALUES (2, 1, 1);
    UPDATE adopted_eager SET status = 'done';
    UPDATE adopted_lazy SET status = 'done', data = '{"n": 2}', secret = 'b'
"""


@pytest.mark.parametrize("held", [True, False])
async def test_relationships_that_are_mapped_eager_are_current(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection, held: bool
) -> None:
    async with session_maker() as session:
        own = await session.get(Eager, 1) if held else None
        task = waiting(session, Eager, 1, columns=[Eager.status])
        await registered()
        await observer.execute(WORK)
        found = await task
        assert own is None or found is own
        assert found.status == "done"
        assert [line.id for line in found.lines] == [1, 2]
        await all_given_back(engine)


async def test_relationships_that_were_loaded_are_current(session_maker: SessionMaker, observer: Connection) -> None:
    async with session_maker() as session:
        own = await session.get_one(Lazy, 1, options=[selectinload(Lazy.lines)])
        assert [line.id for line in own.lines] == [1]
        task = waiting(session, Lazy, 1)
        await registered()
        await observer.execute(WORK)
        assert await task is own
        assert (own.status, [line.id for line in own.lines]) == ("done", [1, 2])


@pytest.mark.parametrize("held", [True, False])
async def test_what_can_be_changed_in_place_still_can(
    session_maker: SessionMaker, observer: Connection, held: bool
) -> None:
    async with session_maker() as session:
        own = await session.get(Lazy, 1) if held else None
        task = waiting(session, Lazy, 1)
        await registered()
        await observer.execute(WORK)
        found = await task
        assert own is None or found is own
        assert (found.data, found.secret) == ({"n": 2}, "b")
        assert not session.dirty
        found.data["n"] = 3
        await session.commit()
    assert await observer.fetchval("SELECT data ->> 'n' FROM adopted_lazy") == "3"


async def test_changes_that_were_not_flushed_survive_beside_eager_relationships(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker() as session:
        own = await session.get_one(Eager, 1)
        own.note = "mine"
        own.lines.append(Line(id=9))
        task = waiting(session, Eager, 1, columns=[Eager.status])
        await registered()
        await observer.execute(WORK)
        assert await task is own
        assert (own.status, own.note, [line.id for line in own.lines]) == ("done", "mine", [1, 9])
        await session.commit()
    assert await observer.fetchval("SELECT note FROM adopted_eager") == "mine"
    assert await observer.fetchval("SELECT count(*) FROM adopted_lines WHERE eager_id = 1") == 3


async def test_a_watch_goes_on_from_what_it_has_shown(session_maker: SessionMaker, observer: Connection) -> None:
    async with session_maker() as session, watch_row(session, Eager, 1, interval=0.05, timeout=0.4) as states:
        assert [line.id for line in (await anext(states)).lines] == [1]
        await observer.execute(WORK)
        row = await anext(states)
        assert (row.status, [line.id for line in row.lines]) == ("done", [1, 2])
        with pytest.raises(WaitTimeoutError):
            await anext(states)


async def test_whoever_listens_to_the_engine_sees_every_read(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection
) -> None:
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine.sync_engine, "after_cursor_execute", note)
    try:
        async with session_maker() as session:
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, Lazy, 1, interval=0.05, timeout=0.2)
    finally:
        event.remove(engine.sync_engine, "after_cursor_execute", note)
    assert len([statement for statement in seen if "adopted_lazy" in statement]) >= 2


@pytest.mark.parametrize("how", ["times out", "is cancelled"])
async def test_nothing_runs_on_a_bound_connection_once_the_wait_has_ended(engine: AsyncEngine, how: str) -> None:
    for n in range(30):
        async with engine.connect() as connection:
            outer = await connection.begin()
            await connection.execute(text("INSERT INTO users VALUES (1, 'before')"))
            async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
                task = waiting(session, User, 1, interval=0.001, timeout=0.02 if how == "times out" else 10)
                if how == "is cancelled":
                    await asyncio.sleep(0.0007 * n)
                    task.cancel()
                with pytest.raises(WaitTimeoutError if how == "times out" else asyncio.CancelledError):
                    await task
                await outer.rollback()


async def test_a_wait_on_a_bound_connection_ends_in_time_behind_a_locked_table(
    engine: AsyncEngine, observer: Connection
) -> None:
    async with observer.transaction(), engine.connect() as connection, connection.begin() as outer:
        await observer.execute("LOCK TABLE users")
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            began = time.monotonic()
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, User, 1, timeout=0.3)
            assert time.monotonic() - began < 1.3 + 0.5
        assert await connection.scalar(text("SELECT current_setting('statement_timeout')")) == "0"
        await outer.rollback()


async def test_what_cannot_be_loaded_in_time_is_a_wait_that_has_timed_out(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection
) -> None:
    """The row has changed, and what belongs to it is locked."""
    async with session_maker() as session, engine.begin() as other:
        await session.get_one(Eager, 1)
        task = waiting(session, Eager, 1, columns=[Eager.status], timeout=0.3)
        await registered()
        await other.execute(text("LOCK TABLE adopted_lines"))
        await observer.execute("UPDATE adopted_eager SET status = 'done'")
        with pytest.raises(WaitTimeoutError, match=r"No change detected on Eager\(1\)"):
            await task


async def test_a_session_in_a_block_reads_in_it(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection
) -> None:
    """Which stays open, and keeps its connection."""
    async with session_maker() as session, session.begin():
        await session.execute(select(Lazy))
        task = waiting(session, Lazy, 1)
        await registered()
        await observer.execute(WORK)
        assert (await task).status == "done"
        assert session.in_transaction()


async def test_what_an_application_made_of_a_column_is_nobody_elses_and_may_change(
    session_maker: SessionMaker, observer: Connection
) -> None:
    """A value of any class, which SQLAlchemy sees only replaced: it is of the caller's own, and not the baseline's."""
    async with session_maker() as one, session_maker() as two:
        tasks = [waiting(session, Chosen, 1, until=lambda row: row.options.dark) for session in (one, two)]
        await registered(2)
        await observer.execute("UPDATE adopted_chosen SET options = '{\"dark\": true}'")
        first, second = await asyncio.gather(*tasks)
        first.options.dark = False
        assert second.options == Options(dark=True)
    async with session_maker() as session, watch_row(session, Chosen, 1, interval=0.05, timeout=0.2) as states:
        (await anext(states)).options.dark = False
        with pytest.raises(WaitTimeoutError):
            await anext(states)


async def test_rows_that_were_handed_to_several_are_not_one(session_maker: SessionMaker, observer: Connection) -> None:
    async with session_maker() as one, session_maker() as two, session_maker() as three:
        own = await three.get_one(Lazy, 1)
        tasks = [waiting(session, Lazy, 1) for session in (one, two, three)]
        await registered(3)
        await observer.execute(WORK)
        rows = await asyncio.gather(*tasks)
        assert rows[2] is own
        rows[0].data["n"] = 7
        assert [row.data["n"] for row in rows] == [7, 2, 2]
        assert [bool(session.dirty) for session in (one, two, three)] == [True, False, False]


def test_it_is_declared_with_a_coordinator_alone(session_maker: SessionMaker) -> None:
    with pytest.raises(ValueError, match="read_settings"):
        Coordinator(session_maker, read_settings=5)  # type: ignore[arg-type]
