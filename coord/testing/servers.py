"""PostgreSQL and Redis for one test process: embedded, or those that two variables name; a database from a template."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis
from sqlalchemy import URL, bindparam, func, make_url, select, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from coord.dev.embedded import PostgreSQL, Valkey
from coord.jobs.migrations import create_ledger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    Schema = Callable[[AsyncConnection], Awaitable[None]] | Callable[[Connection], None]

DATABASE, REDIS = "COORD_TEST_DATABASE_URL", "COORD_TEST_REDIS_URL"
UNSAFE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""Nothing of a test's has to survive a loss of power."""
KEPT_FREE = 1
"""Databases of a given Redis, from 0 on, that are nobody's here."""
_is_there = select(func.count()).select_from(text("pg_database")).where(text("datname = :name"))
_others = select(func.count()).select_from(text("pg_database")).where(text("starts_with(datname, :name)"))


@dataclass(frozen=True, slots=True)
class Servers:
    """A database that has your tables and the ledger, and a Redis; both are this test process's alone."""

    database_url: str
    redis_url: str


class Host:
    """Where the databases of one test process are made, each from the template."""

    def __init__(self, url: URL, redis_urls: tuple[str, str], run: str, worker: str, schema: Schema) -> None:
        self._url = url
        self._redis_urls = redis_urls
        self._run = f"coord_test_{run}_"
        self._template = f"{self._run}template"
        self._names = (f"{self._run}{worker}_{number}" for number in count())
        self._schema = schema

    @contextmanager
    def servers(self, *, of_one_test: bool = False) -> Iterator[Servers]:
        """A new database, dropped at the end, and a Redis, emptied before and after."""
        name, redis_url = next(self._names), self._redis_urls[of_one_test]
        _empty(redis_url)
        _in_a_loop(self._create(name))
        try:
            yield Servers(self._url.set(database=name).render_as_string(hide_password=False), redis_url)
        finally:
            _in_a_loop(self._drop(name))
            _empty(redis_url)

    async def prepare(self) -> None:
        """Make the template, if no other process of the run has."""
        async with self._alone() as connection:
            await self._prepare(connection)

    async def clean(self) -> None:
        """Drop the template, unless another process of the run still has a database."""
        async with self._alone() as connection:
            if await connection.scalar(_others, {"name": self._run}) == 1:
                await _run(connection, "DROP DATABASE IF EXISTS {}", self._template)

    async def _create(self, name: str) -> None:
        """A process that ended while this one had no database has dropped the template."""
        async with self._alone() as connection:
            await self._prepare(connection)
            await _run(connection, "CREATE DATABASE {} TEMPLATE {}", name, self._template)

    async def _drop(self, name: str) -> None:
        async with _connected(self._url) as connection:
            await _run(connection, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    async def _prepare(self, connection: AsyncConnection) -> None:
        if await connection.scalar(_is_there, {"name": self._template}):
            return
        unfinished = f"{self._template}_unfinished"
        await _run(connection, "DROP DATABASE IF EXISTS {} WITH (FORCE)", unfinished)
        await _run(connection, "CREATE DATABASE {}", unfinished)
        try:
            await _fill(self._url.set(database=unfinished), self._schema)
            await _run(connection, "ALTER DATABASE {} RENAME TO {}", unfinished, self._template)
        except BaseException:
            await _run(connection, "DROP DATABASE IF EXISTS {} WITH (FORCE)", unfinished)
            raise

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[AsyncConnection]:
        """One process of the run at a time."""
        async with _connected(self._url) as connection:
            lock = select(func.pg_advisory_lock(func.hashtextextended(bindparam("run"), 0)))
            await connection.execute(lock, {"run": self._run})
            yield connection  # whose end unlocks


@contextmanager
def open_host(schema: Schema, environ: Mapping[str, str] = os.environ) -> Iterator[Host]:
    """Servers and the template, until the block ends. `schema` makes your tables, in the template.

    It is a coroutine function of an `AsyncConnection`, or a function of a `Connection` as `metadata.create_all` is.
    """
    worker = environ.get("PYTEST_XDIST_WORKER", "gw0")
    run = environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)[:12]
    url, redis_urls = _given_database(environ), _given_redis(environ, int(worker[2:]))
    with ExitStack() as stack:
        if url is None or redis_urls is None:
            directory = Path(tempfile.mkdtemp(prefix="coord-"))  # pytest's own is closed to the server's user
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if url is None:
            url = make_url(stack.enter_context(PostgreSQL(directory / "postgresql", settings=UNSAFE)).url)
        if redis_urls is None:
            redis_url = stack.enter_context(Valkey(directory / "valkey")).url
            redis_urls = redis_url, _numbered(redis_url, 1)
        host = Host(url, redis_urls, run, worker, schema)
        _in_a_loop(host.prepare())
        stack.callback(lambda: _in_a_loop(host.clean()))
        yield host


def _given_database(environ: Mapping[str, str]) -> URL | None:
    if not (given := environ.get(DATABASE)):
        return None
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):  # not shown: what cannot be parsed may hold a password anywhere
        raise ValueError(f"{DATABASE}: malformed; it looks like postgresql+asyncpg://user@host:5432/postgres") from None
    if url.drivername != "postgresql+asyncpg":
        raise ValueError(f"{DATABASE}: needs the driver postgresql+asyncpg, not {url.drivername}")
    return url


def _given_redis(environ: Mapping[str, str], worker: int) -> tuple[str, str] | None:
    """Two databases for each worker of xdist: one for all of its tests, one for a test that has its own."""
    if not (given := environ.get(REDIS)):
        return None
    if not given.startswith(("redis://", "rediss://")):
        raise ValueError(f"{REDIS}: malformed; it looks like redis://host:6379")
    first = KEPT_FREE + 2 * worker
    return _numbered(given, first), _numbered(given, first + 1)


def _numbered(url: str, number: int) -> str:
    return urlsplit(url)._replace(path=f"/{number}").geturl()


def _empty(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        try:
            client.flushdb()
        except redis.ResponseError as error:
            number = urlsplit(redis_url).path.removeprefix("/")
            raise ValueError(
                f"{REDIS}: its database {number} cannot be emptied ({error}). Each xdist worker uses two, from "
                f"{KEPT_FREE} on: with its usual 16 a Redis serves 7 workers"
            ) from error


def _in_a_loop(work: Coroutine[Any, Any, None]) -> None:
    """Done in an event loop of its own, in a thread: the tests' may be of any kind and scope."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


@asynccontextmanager
async def _connected(url: URL) -> AsyncIterator[AsyncConnection]:
    """To the given database, where databases are made; each statement is a transaction."""
    engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


async def _run(connection: AsyncConnection, statement: str, *names: str) -> None:
    quote = connection.dialect.identifier_preparer.quote_identifier
    await connection.execute(text(statement.format(*map(quote, names))))


async def _fill(url: URL, schema: Any) -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await (schema(connection) if inspect.iscoroutinefunction(schema) else connection.run_sync(schema))
            await create_ledger(connection)  # where the schema has put it, if it has
    finally:
        await engine.dispose()
