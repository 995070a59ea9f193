"""coord's fixtures for pytest.

pytest imports this in every run, so it is a module of its own: an import of anything in `coord` would bring all of it,
SQLAlchemy and FastAPI too. That comes with the first fixture that is asked for. See `docs/testing.md`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.testing import Servers

LOOP_SCOPES = ("function", "class", "module", "package", "session")
_SESSIONS = "_coord_sessions_of_"


@pytest.fixture(scope="session")
def coord_schema() -> Any:
    """Override it to make your tables: a coroutine function of an AsyncConnection, or `metadata.create_all`.

    Called in the template from which every database is made, as a rule once; the ledger's tables are made after it.
    """
    return lambda _connection: None


@pytest.fixture(scope="session")
def coord_session_options() -> dict[str, Any]:
    """Override it for sessions like your application's: keyword arguments of async_sessionmaker."""
    return {}


@pytest.fixture(scope="session")
def _coord_host(coord_schema: Any) -> Iterator[Any]:
    from coord.testing.servers import open_host

    with open_host(coord_schema) as host:
        yield host


@pytest.fixture(scope="session")
def coord_servers(_coord_host: Any) -> Iterator[Servers]:
    """A database and a Redis of this test process alone, `database_url` and `redis_url`, for all of its tests."""
    with _coord_host.servers() as servers:
        yield servers


@pytest.fixture
def coord_database(_coord_host: Any) -> Iterator[Servers]:
    """A database and a Redis of this test alone, for what has to commit; dropped after it."""
    with _coord_host.servers(of_one_test=True) as servers:
        yield servers


def _sessions() -> Callable[..., AsyncIterator[tuple[async_sessionmaker[AsyncSession], AsyncSession]]]:
    """A function of its own for each fixture: pytest-asyncio notes on it in which loop it runs."""

    async def sessions(
        coord_servers: Servers, coord_session_options: dict[str, Any]
    ) -> AsyncIterator[tuple[async_sessionmaker[AsyncSession], AsyncSession]]:
        from coord.testing import rolled_back

        options, url = coord_session_options, coord_servers.database_url
        async with rolled_back(url, **options) as session_maker, session_maker() as session:
            yield session_maker, session
            await session.rollback()

    return sessions


# The connection is to be opened and closed in the event loop of the test that asks for it, whoever runs that.
globals()[f"{_SESSIONS}anyio"] = pytest.fixture(_sessions(), name=f"{_SESSIONS}anyio")
if importlib.util.find_spec("pytest_asyncio") is not None:
    import pytest_asyncio

    for _scope in LOOP_SCOPES:
        _fixture: Any = pytest_asyncio.fixture(loop_scope=_scope, name=f"{_SESSIONS}{_scope}")  # type: ignore[call-overload]
        globals()[f"{_SESSIONS}{_scope}"] = _fixture(_sessions())


@pytest.fixture
def coord_session_maker(request: pytest.FixtureRequest) -> async_sessionmaker[AsyncSession]:
    """Makes sessions on one connection, which commit as they like: its transaction is rolled back after the test."""
    maker: async_sessionmaker[AsyncSession] = request.getfixturevalue(f"{_SESSIONS}{_loop_of(request)}")[0]
    return maker


@pytest.fixture
def coord_session(request: pytest.FixtureRequest) -> AsyncSession:
    """A session of `coord_session_maker`, the test's own."""
    session: AsyncSession = request.getfixturevalue(f"{_SESSIONS}{_loop_of(request)}")[1]
    return session


def _loop_of(request: pytest.FixtureRequest) -> str:
    """Who runs the test: anyio's plugin, or pytest-asyncio in an event loop of which scope."""
    marker = request.node.get_closest_marker("asyncio")
    if "anyio_backend" in request.fixturenames and marker is None:
        return "anyio"
    if not request.config.pluginmanager.hasplugin("asyncio"):
        raise pytest.UsageError("coord_session_maker needs an event loop: of pytest-asyncio, or of anyio's plugin")
    default = request.config.getini("asyncio_default_test_loop_scope")
    return str((marker.kwargs.get("loop_scope") if marker else None) or default)
