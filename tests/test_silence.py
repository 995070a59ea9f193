"""Waits while PostgreSQL is silent, or has no connection left: none ends late, or leaves its session in use."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import relationship

import coord.waiting.session_reader
from coord import Coordinator, WaitTimeoutError, wait_for_row_change
from coord.waiting.reader import Reader
from tests.models import Base, Document, User
from tests.proxy import Proxy, Wire
from tests.serving import engine_at
from tests.waits import registered, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection

pytestmark = pytest.mark.usefixtures("tables", "nobody_left_waiting")


class Way:
    """To PostgreSQL: it swallows what a session reads by itself, and all that comes after it on that connection."""

    def __init__(self, proxy: Proxy, engine: AsyncEngine) -> None:
        self.session_maker = async_sessionmaker(engine, expire_on_commit=False)
        self.lost = 0
        self._proxy = proxy

    def lose_next(self) -> None:
        def swallow(wire: Wire, data: bytes) -> bool:
            if b"users.name" in data and not self.lost:
                self.lost += 1
                wire.is_dead = True
            return False

        self._proxy.on_request = swallow


@pytest.fixture
async def way(database_url: str) -> AsyncIterator[Way]:
    async with Proxy(database_url).opened() as proxy:
        engine = create_async_engine(proxy.url)
        yield Way(proxy, engine)
        await engine.dispose()


async def test_a_session_whose_own_read_was_not_answered_can_be_used_at_once(way: Way, user: int) -> None:
    way.lose_next()
    async with way.session_maker() as session:
        began = time.monotonic()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, user, timeout=0.5)
        assert time.monotonic() - began < 1.5
        assert way.lost == 1
        row = await session.get(User, user)
        assert row is not None
        assert row.name == "before"
        await session.commit()
        assert time.monotonic() - began < 2


async def test_a_wait_without_a_deadline_goes_on_after_a_read_that_was_not_answered(
    way: Way, user: int, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.waiting.session_reader, "READ_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(coord.waiting.session_reader, "ADOPTION_TIMEOUT_SECONDS", 0.3)
    way.lose_next()
    async with way.session_maker() as session:
        task = waiting(session, User, user, timeout=None)
        await registered()
        assert way.lost == 1
        await observer.execute("UPDATE users SET name = 'after'")
        async with asyncio.timeout(5):
            assert (await task).name == "after"


async def test_a_wait_whose_values_postgresql_has_to_compare_ends_by_its_deadline(
    database_url: str, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's one connection is somebody else's by then."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    stores = Reader.stores

    async with AsyncExitStack() as elsewhere:

        async def crowded(self: Reader, *arguments: Any) -> bool:
            await elsewhere.enter_async_context(engine.connect())
            return await stores(self, *arguments)

        monkeypatch.setattr(Reader, "stores", crowded)
        maker = async_sessionmaker(engine, expire_on_commit=False)
        async with Coordinator(maker, read_settings={}), maker() as session:
            began = time.monotonic()
            async with asyncio.timeout(5):
                with pytest.raises(WaitTimeoutError):
                    await wait_for_row_change(session, User, user, since={"name": "before "}, timeout=0.5)
            assert time.monotonic() - began < 1.5
    await engine.dispose()


class Cut:
    """Ends the connection by which a statement with this text is sent, once."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.times = 0

    def __call__(self, wire: Wire, data: bytes) -> bool:
        if self.text in data and not self.times:
            self.times += 1
            wire.cut()
        return False


class Letter:
    """A document whose owner is loaded when asked for."""

    x: int
    owner: User


Base.registry.map_imperatively(Letter, Document.__table__, properties={"owner": relationship(User, viewonly=True)})


async def test_what_was_loaded_is_loaded_again_although_a_connection_was_lost_meanwhile(
    database_url: str, user: int, observer: Connection
) -> None:
    key, cut = UUID(int=1), Cut(b"WHERE documents.id = $1")
    seen = {"prepared_statement_cache_size": 0}  # each statement goes over the wire as a text
    await observer.execute("INSERT INTO documents VALUES ($1, '{}', 0, 0, 0, 1)", key)

    async with Proxy(database_url).opened() as proxy, engine_at(proxy.url, connect_args=seen) as engine:
        maker = async_sessionmaker(engine, expire_on_commit=False)
        async with Coordinator(maker, read_settings={}), maker() as session:
            own = await session.get_one(Letter, key)
            await session.refresh(own, ["owner"])
            task = waiting(session, Letter, key, since={"x": 0})
            await registered()
            proxy.on_request = cut
            await observer.execute("UPDATE documents SET x = 1")
            assert await task is own
            assert (own.x, own.owner.name, cut.times) == (1, "before", 1)


@pytest.mark.parametrize("settings", [{}, None], ids=["declared", "undeclared"])
@pytest.mark.parametrize("loaded", [True, False])
async def test_a_wait_whose_row_is_refreshed_on_a_lost_connection_refreshes_it_on_another(
    database_url: str, user: int, observer: Connection, settings: dict[str, str] | None, loaded: bool
) -> None:
    """The row has ended the wait by then: what is left is to make the session's own instance current."""
    key, cut = UUID(int=1), Cut(b"FROM users")
    await observer.execute("INSERT INTO documents VALUES ($1, '{}', 0, 0, 0, 1)", key)

    async with Proxy(database_url).opened() as proxy:
        engine = create_async_engine(proxy.url)
        maker = async_sessionmaker(engine, expire_on_commit=False)
        async with Coordinator(maker, read_settings=settings), maker() as session:
            own = await session.get(Document, key) if loaded else None
            task = waiting(session, Document, key, since={"x": 0})
            await registered()
            proxy.on_request = cut
            await observer.execute("UPDATE documents SET x = 1")
            row = await task
            assert own in (None, row)
            assert (row.x, row.owner.name, cut.times) == (1, "before", 1)
        await engine.dispose()
