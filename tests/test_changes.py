"""Changes: told of rows that were flushed, by the key that others know them by."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import Delete, Update, create_engine, func, inspect, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Mapped, Session, foreign, relationship

from coord.notify import changes
from coord.notify.changes import collect
from tests.models import Base, Document, Item, User, table_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.notify.changes import Changed

pytestmark = pytest.mark.usefixtures("tables")

USERS = table_of(User)


class Author(Base):
    """A user with a collection."""

    __table__ = USERS
    items: Mapped[list[Item]] = relationship(Item, primaryjoin=USERS.c.id == foreign(Item.user_id))


class Owned(Base):
    """An item whose owner is set once both rows are there."""

    __table__ = table_of(Item)
    owner: Mapped[User | None] = relationship(
        User, primaryjoin=foreign(table_of(Item).c.user_id) == USERS.c.id, post_update=True, overlaps="items"
    )


@contextmanager
def observed(engine: AsyncEngine) -> Iterator[list[Any]]:
    """The keys of the rows that are told of, with their class."""
    told: list[Any] = []

    def tell(_session: Session, found: Changed) -> bool:
        told.extend((mapper.class_, key) for mapper, key in found)
        return True

    with changes.observed(engine.dialect, tell):
        yield told


async def test_a_row_is_told_of_when_a_column_of_it_was_set(
    engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    async with session_maker() as session:
        author, user, item, document = Author(id=1), User(id=2), Item(id=3), Document(id=uuid4(), body={"n": 1})
        session.add_all([author, user, item, document])
        await session.commit()
        await session.refresh(author, ["items"])
        with observed(engine) as told:
            author.items.append(item)
            await session.commit()
            assert told == [(Item, (3,))], "its foreign key was set, and nothing of the author's own row"
            user.name = "after"
            await session.commit()
            assert told[1:] == [(User, (2,))]
            document.body["n"] = 2  # in place
            await session.commit()
            assert told[2:] == [(Document, (document.id,))]
            await session.delete(document)
            await session.commit()
            assert told[3:] == [(Document, (document.id,))]


async def test_a_row_whose_key_changes_is_told_of_by_the_key_it_had(
    engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    async with session_maker() as session:
        user = User(id=1)
        session.add(user)
        await session.commit()
        with observed(engine) as told:
            user.id = 2
            await session.flush()
            user.name = "after"
            await session.commit()
        assert told == [(User, (1,)), (User, (2,))]


async def test_a_session_that_only_reads_tells_nothing(
    engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    async with session_maker() as session:
        session.add(User(id=1))
        await session.commit()
        with observed(engine) as told:
            await session.get(User, 1)
            await session.commit()
        assert told == []


async def test_a_row_that_was_set_to_what_it_was_is_not_told_of(
    engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    async with session_maker() as session:
        user = User(id=1, name="as it was")
        session.add(user)
        await session.commit()
        with observed(engine) as told:
            await session.refresh(user)
            user.name = "something else"
            user.name = "as it was"
            assert session.dirty
            await session.commit()
        assert told == []


async def test_a_column_set_to_an_expression_is_a_change(
    engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    async with session_maker() as session:
        user = User(id=1, name="a")
        session.add(user)
        await session.commit()
        with observed(engine) as told:
            user.name = func.upper(User.name)
            await session.commit()
        assert told == [(User, (1,))]


async def test_a_row_changed_after_it_was_flushed_is_told_of(
    engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    """By a relationship with `post_update`."""
    async with session_maker() as session:
        owner, item = User(id=1), Owned(id=2)
        session.add_all([owner, item])
        await session.commit()
        with observed(engine) as told:
            await session.refresh(item, ["owner"])
            item.owner = owner
            await session.commit()
        assert told == [(Owned, (2,))]


async def test_rows_are_told_of_where_their_engine_is_observed(engine: AsyncEngine, database_url: str) -> None:
    """A session's `binds` say where a class goes, or a `get_bind` of the application's own."""

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **options: Any) -> Any:
            is_write = self._flushing or isinstance(clause, Update | Delete)
            return engine.sync_engine if is_write else other.sync_engine

    other = create_async_engine(database_url)
    by_class = async_sessionmaker(bind=other, binds={User: engine}, expire_on_commit=False)
    by_rule = async_sessionmaker(sync_session_class=Routing, expire_on_commit=False)
    with observed(engine) as told, observed(other) as elsewhere:
        async with by_class() as session:
            session.add_all([User(id=1), Item(id=1)])
            await session.execute(update(User).values(name="after"))
            await session.execute(update(Item).values(user_id=None))
            collect(session.sync_session, (inspect(User), (9,)))
            await session.commit()
            assert set(told) == {(User, (1,)), (User, None), (User, (9,))}
            assert set(elsewhere) == {(Item, (1,)), (Item, None)}
        told.clear()
        elsewhere.clear()
        async with by_rule() as session:
            session.add(Item(id=2))
            await session.flush()
            await session.execute(update(Item).values(user_id=None))
            collect(session.sync_session, (inspect(Item), (9,)))
            await session.commit()
        assert told == [(Item, (2,)), (Item, None), (Item, (9,))]
        assert elsewhere == []
    await other.dispose()


async def test_rows_of_a_session_bound_to_one_connection_are_told_of(engine: AsyncEngine) -> None:
    async with engine.connect() as connection, AsyncSession(connection) as session:
        with observed(engine) as told:
            session.add(User(id=1))
            await session.commit()
        assert told == [(User, (1,))]


async def test_a_bulk_statement_for_several_shards_is_left_alone(engine: AsyncEngine) -> None:
    """No one engine has its rows, and a chooser that looks at a row, as that of SQLAlchemy's manual, is given none."""

    def by_name(mapper: Any, instance: Any, clause: Any = None) -> Any:
        return instance.name

    shard = create_engine("sqlite://")
    USERS.create(shard)
    every: dict[str, Any] = {"identity_chooser": lambda *_, **__: ["a"], "execute_chooser": lambda _: ["a"]}
    with observed(engine), ShardedSession(shards={"a": shard}, shard_chooser=by_name, **every) as session:
        session.add(User(id=1, name="a"))
        session.execute(update(User).values(name="b"))
        assert session.scalars(select(User.name)).all() == ["b"]
    shard.dispose()
