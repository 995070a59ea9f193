"""Waits under test: begun, and known to have had their first look at the row."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

import coord.waiting.watcher
from coord import Coordinator, wait_for_row_change
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.waiting.waiter import Waiter


def waiting(session: AsyncSession, *arguments: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(wait_for_row_change(session, *arguments, **{"interval": 0.05, "timeout": 10, **options}))


class HeldClosing:
    """The closing of a connection, to be awaited by SQLAlchemy's listener: it lasts until `go`, or is `cancelled`."""

    def __init__(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.cancelled = False

    async def __call__(self, connection: Connection) -> None:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            connection.terminate()  # or nobody would
            raise


async def iterations(count: int = 50) -> None:
    """Of the event loop, in which whatever can go on goes on."""
    for _ in range(count):
        await asyncio.sleep(0)


def open_waits() -> int:
    """How many wait in this event loop, as its cap counts them."""
    watchers = coord.waiting.watcher._watchers.get(asyncio.get_running_loop(), {}).values()
    return sum(watcher.waiters for watcher in watchers)


def waiters() -> list[Waiter[Any]]:
    """All that wait in this event loop."""
    watchers = coord.waiting.watcher._watchers.get(asyncio.get_running_loop(), {}).values()
    groups = [group for watcher in watchers for group in watcher._pollers.values()]
    return [waiter for group in groups for found in group.waiters.values() for waiter in found]


@pytest.fixture(params=[{}, None], ids=["declared", "undeclared"])
async def read_settings(
    request: pytest.FixtureRequest, session_maker: async_sessionmaker[AsyncSession], nobody_left_waiting: None
) -> AsyncIterator[None]:
    """Every test twice: with the rows of the shared read, and with those that each session reads by itself."""
    if request.param is None:
        yield
    else:
        async with Coordinator(session_maker, read_settings=request.param):
            yield


@pytest.fixture
async def user(tables: None, observer: Connection) -> int:
    await observer.execute("INSERT INTO users VALUES (1, 'before')")
    return 1


@pytest.fixture
async def coordinator(
    nobody_left_waiting: None, session_maker: async_sessionmaker[AsyncSession], redis_url: str
) -> AsyncIterator[Coordinator]:
    """Whose shared rows are handed out, and whose bell is connected."""
    async with Coordinator(session_maker, redis=redis_url, read_settings={}) as coordinator:
        await eventually(lambda: coordinator._bell and coordinator._bell.connected)
        yield coordinator


async def registered(count: int = 1, *, within: float = 5.0) -> None:
    """Return once so many wait and everybody who waits has had the first look at the row."""

    def read() -> bool:
        return len(found := waiters()) >= count and all(waiter.has_read for waiter in found)

    await eventually(read, within=within)
