"""Where it is played: the servers, and a table of orders."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.loop import installed
from benchmarks.servers import Servers
from coord import wait_for_row_change

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATIENCE = 120.0
"""Seconds after which anything here has gone wrong."""


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    quantity: Mapped[int]
    status: Mapped[str]


Wait = Callable[[AsyncSession, int, float], Awaitable[Order]]
"""Waits with this session for the order with this id, looking once in so many seconds."""


@dataclass(frozen=True, slots=True)
class Stage(Servers):
    def redis(self, name: str) -> str:
        """The URL of Valkey for clients of this name."""
        return f"{self.redis_url}?client_name={name}"

    @asynccontextmanager
    async def engine(self, name: str, size: int) -> AsyncIterator[AsyncEngine]:
        """An engine with `size` connections and no more, which PostgreSQL knows by `name`."""
        settings = {"server_settings": {"application_name": name}}
        engine = create_async_engine(
            self.database_url, pool_size=size, max_overflow=0, pool_timeout=PATIENCE, connect_args=settings
        )
        try:
            yield engine
        finally:
            await engine.dispose()

    @asynccontextmanager
    async def orders(self, count: int) -> AsyncIterator[None]:
        """A fresh table with the orders 1 to `count`."""
        async with self.engine("orders", 1) as engine, engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)
        async with self.connection() as plain:
            fill = "INSERT INTO orders SELECT n, 'tea', 0, 'pending' FROM generate_series(1, $1::int) n"
            await plain.execute(fill, count)
            await plain.execute("VACUUM ANALYZE orders")
            await plain.execute("CHECKPOINT")
            yield


def missing_peer() -> list[str]:
    """What a report says without it."""
    return [] if installed("fastapi_toolsets") else ["Not measured: fastapi-toolsets, which is not installed."]


def coord_wait(session: AsyncSession, key: int, interval: float) -> Awaitable[Order]:
    return wait_for_row_change(session, Order, key, columns=[Order.status], interval=interval, timeout=PATIENCE)


def toolsets_wait(session: AsyncSession, key: int, interval: float) -> Awaitable[Order]:
    from fastapi_toolsets.db import wait_for_row_change as wait

    found: Awaitable[Order] = wait(session, Order, key, columns=["status"], interval=interval, timeout=PATIENCE)
    return found
