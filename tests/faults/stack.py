"""The shop as its commands run it, each process behind links of its own to servers of its own, and a look past them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import redis.asyncio
from sqlalchemy import make_url

from coord.dev.embedded import PostgreSQL, Valkey
from coord.dev.server import free_port
from tests.clusters import lay
from tests.faults.program import CLOCK, Program
from tests.serving import eventually
from tests.shop import SERVING, WORKER, WORKING, Network, dsn_of, waiting_for_locks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WORKERS = 2
CONNECTIONS = 80
"""`max_connections`: an API and two workers have up to 49."""
LOST = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What a look past the links may meet when the server ends it."""
LEADER = """
    SELECT worker.pid FROM coord_queues AS queue JOIN coord_workers AS worker ON worker.id = queue.leader
    WHERE queue.leader_until > clock_timestamp()
"""
LOCKING = """
    SELECT client_port FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%coord_lock%'
"""


class Member:
    """A process of the shop, and its two links."""

    def __init__(self, name: str, command: tuple[str, ...], ready: str, log: Path, links: dict[str, Network]) -> None:
        self.name = name
        self.links = links
        """`postgresql` and `redis`."""
        self.variables: dict[str, str] = {}
        """Beside the two addresses."""
        self._command = command
        self._ready = ready
        self._log = log
        self._program: Program | None = None

    @property
    def postgresql(self) -> Network:
        return self.links["postgresql"]

    @property
    def redis(self) -> Network:
        return self.links["redis"]

    @property
    def program(self) -> Program:
        assert self._program is not None
        return self._program

    @property
    def pid(self) -> int:
        return self.program.process.pid

    @property
    def is_alive(self) -> bool:
        return self._program is not None and not self._program.ended

    async def start(self, *, clock: float = 0.0) -> None:
        """Return when it serves. `clock`: seconds by which its clock is off."""
        addresses = {"COORD_DATABASE_URL": self.postgresql.url, "COORD_REDIS_URL": self.redis.url}
        command = (CLOCK, str(clock), *self._command) if clock else self._command
        self._program = Program(command, self._log, addresses | self.variables)
        await self._program.has_said(self._ready)

    async def stop(self) -> None:
        """As a supervisor does."""
        if self._program is not None:
            await self._program.stop()
            self._program = None

    def kill(self, *, machine: bool = False) -> None:
        """`machine`: its heartbeat's process with it, which cannot say so any more."""
        self.signal(signal.SIGKILL, children=machine)

    def freeze(self) -> None:
        """With its heartbeat's process, as where the machine stands still."""
        self.signal(signal.SIGSTOP, children=True)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT, children=True)

    def signal(self, number: signal.Signals, *, children: bool) -> None:
        for pid in [*(self._children() if children else ()), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _children(self) -> list[int]:
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [*map(int, listed.read_text().split())] if listed.exists() else []


class Stack:
    """An API, two workers, PostgreSQL and Valkey; nothing of it is anybody else's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        settings = {"fsync": "off", "max_connections": str(CONNECTIONS)}
        self.postgresql = PostgreSQL(lay(directory / "postgresql"), settings=settings)
        self.valkey = Valkey(directory / "valkey")
        self.members: list[Member] = []
        self.url = f"http://127.0.0.1:{free_port()}"

    @property
    def api(self) -> Member:
        return self.members[0]

    @property
    def workers(self) -> list[Member]:
        return self.members[1:]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Stack]:
        async with AsyncExitStack() as exits:
            for server in (self.postgresql, self.valkey):
                await asyncio.to_thread(server.start)
                exits.push_async_callback(asyncio.to_thread, server.stop)
            await self._add(exits, "api", ("uvicorn", "api:app", "--port", self.url.rpartition(":")[2]), SERVING)
            for number in range(WORKERS):
                await self._add(exits, f"worker-{number + 1}", WORKER, WORKING)
            await asyncio.gather(*(member.start() for member in self.members))
            yield self

    async def _add(self, exits: AsyncExitStack, name: str, command: tuple[str, ...], ready: str) -> None:
        links = {}
        for server in (self.postgresql, self.valkey):
            link = await exits.enter_async_context(Network(server.url).opened())
            link.up = True
            links["postgresql" if server is self.postgresql else "redis"] = link
        member = Member(name, command, ready, self.directory / f"{name}.log", links)
        self.members.append(member)
        exits.push_async_callback(member.stop)

    def links(self, server: str) -> list[Network]:
        """Everybody's to that server."""
        return [member.links[server] for member in self.members]

    @asynccontextmanager
    async def sql(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection past all links."""
        connection = await asyncpg.connect(dsn_of(self.postgresql.url))
        try:
            yield connection
        finally:
            await connection.close()

    async def ask(self, statement: str, *values: Any) -> Any:
        """The one value that PostgreSQL answers."""
        async with self.sql() as connection:
            return await connection.fetchval(statement, *values)

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[Any]:
        client = redis.asyncio.Redis.from_url(self.valkey.url, decode_responses=True)
        try:
            yield client
        finally:
            await client.aclose()

    async def leader(self, within: float = 10.0) -> Member:
        """The worker that looks after the queue, once there is one."""

        async def found() -> Member | None:
            pid = await self.ask(LEADER)
            return next((worker for worker in self.workers if worker.is_alive and worker.pid == pid), None)

        member: Member = await eventually(found, within=within, message="nobody looks after the queue")
        return member

    async def follower(self) -> Member:
        """A worker that does not."""
        leader = await self.leader()
        return next(worker for worker in self.workers if worker is not leader)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[asyncpg.Connection]:
        """While nobody gets at the stock: jobs stand in their transaction, waiting for its lock."""
        async with self.sql() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("LOCK TABLE stock IN EXCLUSIVE MODE")
            try:
                yield connection
            finally:
                with contextlib.suppress(*LOST):
                    await transaction.rollback()

    async def locking(self) -> dict[str, list[int]]:
        """The members that have jobs which wait for the stock, with the ports of those jobs' connections."""
        async with self.sql() as connection:
            ports = {row["client_port"] for row in await connection.fetch(LOCKING)}
        found: dict[str, list[int]] = {}
        for member in self.members:
            if mine := [wire.port for wire in member.postgresql.wires if wire.port in ports]:
                found[member.name] = mine
        return found

    async def lock_waiters(self) -> int:
        async with self.sql() as connection:
            return await waiting_for_locks(connection)

    async def mend(self) -> None:
        """Everything as it was, whatever a test has left."""
        for server, name in ((self.postgresql, "postgresql"), (self.valkey, "redis")):
            if server.exit_status is not None or not _is_started(server):
                await asyncio.to_thread(server.stop, "immediate")
                await asyncio.to_thread(server.start)
            for link in self.links(name):
                link.up, link.answers_later, link.on_request, link.on_answer = True, 0.0, None, None
                link.target = make_url(server.url)
                link.flows.set()
                link.lead_again()
        for member in self.members:
            if not member.is_alive:
                await member.start()
            member.thaw()


def _is_started(server: PostgreSQL | Valkey) -> bool:
    try:
        return server.pid > 0
    except RuntimeError:
        return False
