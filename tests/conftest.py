"""Real servers for every test, by coord's own kit: embedded ones, or those that the two variables name.

`COORD_TEST_DATABASE_URL` and `COORD_TEST_REDIS_URL` point elsewhere. Every test process has a database of its own
there; one given Redis is shared out by database number, so it must hold nothing of value in numbers 1 to 15.
`COORD_TEST_POOLER` puts a PgBouncer before the engine: see tests/pooler.py.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.schema import CreateSchema

import coord.waiting.watcher
from coord.database.engine import prepare
from coord.database.lock_function import create_lock_function
from tests import warm
from tests.models import Base, empty
from tests.pooler import create_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from coord.testing import Servers

pytest_plugins = [f"tests.{name}" for name in ("ledger", "waits", "workers", "counter", "pages", "clock", "spans")]
"""Their fixtures are every test's; what else is in them is imported."""

LONGEST = (
    "benchmarks",
    "testing_plugin",
    "rescuer",
    "demo",
    "dev",
    "lifecycle",
    "fetcher",
    "http_openapi",
    "documentation",
    "startup",
    "running",
    "locks",
    "session",
    "tools_alembic",
    "coordinator",
    "arq",
    "console_browser",
)
"""Files that are begun first, so that at the end no process is left with one of them."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What is imported and collected stays: to look for garbage in it, now and later, would take seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together and in their order."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="coord-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def coord_schema() -> Any:
    """The library's own tables, for every database that the kit makes."""

    async def create(connection: AsyncConnection) -> None:
        await connection.execute(CreateSchema("Other Shop"))
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(create_lock_function)

    return create


@pytest.fixture(scope="session")
def database_url(coord_servers: Servers) -> str:
    """A database of this test process alone."""
    return coord_servers.database_url


@pytest.fixture(scope="session")
def redis_url(coord_servers: Servers) -> str:
    return coord_servers.redis_url


@pytest.fixture(scope="session")
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with a wide pool; tests that count connections make their own."""
    engine = create_engine(database_url, pool_size=20, max_overflow=0)
    prepare(engine)  # as an application's is before it connects
    yield engine
    await engine.dispose()


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """The server that forks the tests' commands ends with the tests, and they with it."""
    yield
    warm.close()


@pytest.fixture
async def single(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with one connection."""
    engine = create_engine(database_url, pool_size=1, max_overflow=0)
    prepare(engine)
    before = _tasks()
    yield engine
    try:
        await _ended(before)  # a shared read gives its connection back a little later than its last wait ends
    finally:
        await engine.dispose()


@pytest.fixture(scope="session")
def session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


@pytest.fixture
async def tables(engine: AsyncEngine) -> AsyncIterator[None]:
    """Empty tables; emptied again afterwards, which also shows that a test left no lock behind."""
    await empty(engine, Base.metadata)
    yield
    await empty(engine, Base.metadata)


@pytest.fixture
async def observer(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection outside every pool, to see what others see."""
    dsn = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@pytest.fixture(autouse=True)
async def nothing_left_running() -> AsyncIterator[None]:
    """After every test: none of coord's tasks that was not there before."""
    before = _tasks()
    yield
    await _ended(before)


@pytest.fixture
async def nobody_left_waiting(nothing_left_running: None) -> AsyncIterator[None]:
    """After every test: no watcher."""
    yield
    assert not coord.waiting.watcher._watchers.get(asyncio.get_running_loop())


def _tasks() -> set[asyncio.Task[object]]:
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("coord")}


async def _ended(before: set[asyncio.Task[object]]) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 2
    while left := _tasks() - before:
        assert loop.time() < deadline, left
        await asyncio.sleep(0.005)
