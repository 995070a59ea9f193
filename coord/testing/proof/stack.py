"""The application on servers of its own, with links that lead some of its processes to them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING

import asyncpg
from sqlalchemy import make_url

from coord.dev.embedded import PostgreSQL, Valkey
from coord.dev.server import HOST, free_port
from coord.testing.proof.application import Process
from coord.testing.proof.links import Link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from coord.testing.proof.application import Application

START_SECONDS = 60.0
MAX_ENDS = 5
"""Of a process that is to start, after which it never will."""
POLL_SECONDS = 0.1
WORKERS = "SELECT pid FROM coord_workers WHERE NOT dead AND NOT stopping"


class Stack:
    """The first worker has a link to Redis, the second one to PostgreSQL; everybody else reaches both without."""

    def __init__(self, application: Application, directory: Path) -> None:
        self._application = application
        self._directory = directory
        self.postgresql = PostgreSQL(directory / "postgresql", settings={"fsync": "off"})  # the machine never fails
        self.valkey = Valkey(directory / "valkey")
        self.links: list[Link] = []
        self.workers: list[Process] = []
        self.api: Process
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Entered when the API accepts connections and every worker's heartbeat was seen."""
        application = self._application
        async with contextlib.AsyncExitStack() as exits:
            for server in (self.postgresql, self.valkey):
                await asyncio.to_thread(server.start)
                exits.push_async_callback(asyncio.to_thread, server.stop)
            urls = {application.database_variable: self.postgresql.url, application.redis_variable: self.valkey.url}
            self.port = free_port()
            listening = [part.replace("{port}", str(self.port)) for part in application.api]
            self.api = self._start(exits, listening, "api", urls)
            for variable in (application.redis_variable, application.database_variable):
                self.links.append(await exits.enter_async_context(Link(urls[variable]).opened()))
            linked = [(application.redis_variable, self.links[0]), (application.database_variable, self.links[1])]
            for number, command in enumerate(application.workers):
                own = {variable: link.url for variable, link in linked[number : number + 1]}
                self.workers.append(self._start(exits, command, f"worker-{number + 1}", {**urls, **own}))
            await self.serves(max_ends=MAX_ENDS)
            await self._work()
            yield

    def _start(
        self, exits: contextlib.AsyncExitStack, command: Sequence[str], name: str, urls: Mapping[str, str]
    ) -> Process:
        process = Process(command, self._application, self._directory / f"{name}.log", urls)
        exits.push_async_callback(process.stop)
        return process

    def link_of(self, worker: Process) -> Link | None:
        number = self.workers.index(worker)
        return self.links[number] if number < len(self.links) else None

    async def connect(self) -> asyncpg.Connection:
        dsn = make_url(self.postgresql.url).set(drivername="postgresql").render_as_string(hide_password=False)
        return await asyncpg.connect(dsn)

    async def serves(self, *, max_ends: float = math.inf) -> None:
        """Return when the API accepts a connection; in a storm it may end at its start whenever PostgreSQL is away."""
        before = self.api.ends
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while self.api.ends < before + max_ends:
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_connection(HOST, self.port)
                        writer.close()
                        return
                    await asyncio.sleep(POLL_SECONDS)
        raise self.api.failure(f"does not listen on {HOST}:{self.port}, and has ended {self.api.ends - before} times")

    async def at_work(self) -> list[Process]:
        """The workers that live, reach both servers, and have said so to the ledger; none if nobody can tell."""
        try:
            connection = await self.connect()
            try:
                known = {row["pid"] for row in await connection.fetch(WORKERS)}
            finally:
                await connection.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return []  # it restarts, or there is no ledger yet
        linked = ((worker, self.link_of(worker)) for worker in self.workers)
        return [one for one, link in linked if one.is_alive and one.pid in known and (link is None or link.up)]

    async def _work(self) -> None:
        found: list[Process] = []
        before = [worker.ends for worker in self.workers]  # without tables, until the API had made them
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while all(worker.ends < ends + MAX_ENDS for worker, ends in zip(self.workers, before, strict=True)):
                    found = await self.at_work()
                    if len(found) == len(self.workers):
                        return
                    await asyncio.sleep(POLL_SECONDS)
        worker = max((worker for worker in self.workers if worker not in found), key=lambda worker: worker.ends)
        raise worker.failure(f"has no heartbeat in the ledger, and has ended {worker.ends} times")
