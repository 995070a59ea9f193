"""Where it is played: a PostgreSQL and a Valkey of its own, with default settings, and a table of orders."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from coord import wait_for_row_change
from coord.embedded import PostgreSQL, Valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

T = TypeVar("T")

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
class Stage:
    database_url: str
    redis_url: str
    postgresql_pid: int

    @property
    def dsn(self) -> str:
        return self.database_url.replace("+asyncpg", "")

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
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.dsn)
        try:
            yield connection
        finally:
            await connection.close()

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


@contextmanager
def opened() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="coord-benchmark-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o711)  # as root, PostgreSQL runs as somebody else
        with PostgreSQL(directory / "postgresql") as postgresql, Valkey(directory / "valkey") as valkey:
            yield Stage(postgresql.url, valkey.url, postgresql.pid)


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run` does, on uvloop if it is there."""
    loop = importlib.import_module("uvloop").new_event_loop if installed("uvloop") else None
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing_peer() -> list[str]:
    """What a report says without it."""
    return [] if installed("fastapi_toolsets") else ["Not measured: fastapi-toolsets, which is not installed."]


def coord_wait(session: AsyncSession, key: int, interval: float) -> Awaitable[Order]:
    return wait_for_row_change(session, Order, key, columns=[Order.status], interval=interval, timeout=PATIENCE)


def toolsets_wait(session: AsyncSession, key: int, interval: float) -> Awaitable[Order]:
    from fastapi_toolsets.db import wait_for_row_change as wait

    found: Awaitable[Order] = wait(session, Order, key, columns=["status"], interval=interval, timeout=PATIENCE)
    return found
