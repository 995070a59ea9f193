"""Changes: told of rows that were flushed, by the key that others know them by."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy.orm import Mapped, foreign, relationship

from coord.hints.changes import Changes
from tests.models import Base, Document, Item, User, table_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session

    from coord.hints.changes import Change

pytestmark = pytest.mark.usefixtures("tables")

USERS = table_of(User)


class Author(Base):
    """A user with a collection."""

    __table__ = USERS
    items: Mapped[list[Item]] = relationship(Item, primaryjoin=USERS.c.id == foreign(Item.user_id))


@contextmanager
def observed(engine: AsyncEngine) -> Iterator[list[Any]]:
    """The keys of the rows that are told of, with their class."""
    told: list[Any] = []

    def tell(_session: Session, changes: Collection[Change]) -> None:
        told.extend((mapper.class_, key) for mapper, key in changes)

    with Changes(engine.dialect, tell).observed():
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
