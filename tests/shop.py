"""The reference application's two commands as processes, and a network that can be cut between them and a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import redis.asyncio
from sqlalchemy import make_url

from tests import warm
from tests.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parent.parent
API = ("uvicorn", "api:app", "--port", "0")
WORKER = ("arq", "worker.Settings")
SERVING = r"Uvicorn running on (http://\S+)"
WORKING = "redis_version="


class Command:
    """A command's process, and what it has written to stderr, line by line."""

    def __init__(self, process: warm.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._news = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for line in self.process.stderr:
            async with self._news:
                self.lines.append(line.decode().rstrip("\n"))
                self._news.notify_all()

    async def says(self, pattern: str, within: float = 20.0) -> re.Match[str]:
        """Its first line that matches, waited for."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        try:
            async with asyncio.timeout(within), self._news:
                match = await self._news.wait_for(found)
        except TimeoutError:
            raise AssertionError(f"it never said {pattern!r}, but: {self.lines}") from None
        assert match is not None
        return match

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.lines)

    async def exit_status(self, within: float = 40.0) -> int:
        """Waited for; all its lines are there then."""
        async with asyncio.timeout(within):
            await asyncio.wait([self._reading])  # which a time-out must not cancel
            return await self.process.wait()

    async def stop(self) -> int:
        """As a supervisor does: SIGTERM, and SIGKILL for who does not listen."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            return await self.exit_status()
        except TimeoutError:
            self.process.kill()
            await self.exit_status()
            raise


@contextlib.asynccontextmanager
async def running(
    command: tuple[str, ...], database_url: str, redis_url: str, **environment: str
) -> AsyncIterator[Command]:
    """The command, started; not waited for."""
    urls = {"COORD_DATABASE_URL": database_url, "COORD_REDIS_URL": redis_url}
    running = Command(await warm.start(*command, env={**os.environ, **urls, **environment}))
    try:
        yield running
    finally:
        await running.stop()


async def emptied(redis_url: str) -> None:
    """Of the jobs that earlier tests have left without a worker."""
    client = redis.asyncio.Redis.from_url(redis_url)
    await client.flushdb()
    await client.aclose()


@contextlib.asynccontextmanager
async def empty_database(database_url: str, template: str = "template1") -> AsyncIterator[str]:
    """A new database beside the given one, dropped at the end; with what is in the template."""
    name = f"coord_shop_{uuid.uuid4().hex[:12]}"
    url = make_url(database_url)
    server = await asyncpg.connect(dsn_of(database_url))
    await server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


def dsn_of(database_url: str) -> str:
    return make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)


async def waiting_for_locks(connection: asyncpg.Connection, statement: str = "") -> int:
    """How many of the database's sessions wait for a lock at this moment, in a statement that begins like this."""
    await connection.execute("SELECT pg_stat_clear_snapshot()")  # which a transaction would look at for ever
    count: int = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock' AND starts_with(query, $1)",
        statement,
    )
    return count


class Network(Proxy):
    """A port that leads to a server while it is `up`, answers nothing while it is not, and counts who has come."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.up = False
        self.visits = 0
        self._visited = asyncio.Condition()

    def cut(self) -> None:
        """Refuse who comes, and throw out who is there."""
        self.up = False
        super().cut()

    async def visited(self, more: int, within: float = 20.0) -> None:
        """Wait until so many more have come, in vain or not."""
        aim = self.visits + more
        async with asyncio.timeout(within), self._visited:
            await self._visited.wait_for(lambda: self.visits >= aim)

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._visited:
            self.visits += 1
            self._visited.notify_all()
        with contextlib.suppress(OSError):
            if self.up:
                await super()._lead(reader, writer)
        writer.transport.abort()
