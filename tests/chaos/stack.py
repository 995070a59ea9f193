"""The shop as its commands run it, on servers of its own, and who starts a worker again that has ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

import redis.asyncio

from coord.dev.embedded import PostgreSQL, Valkey
from coord.dev.process import end, spawn
from tests.shop import API, ROOT, SERVING, WORKER, WORKING, Network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CLOCK = "tests.chaos.clock"
CLOCKS = (-600.0, 600.0, 0.0)
"""Seconds by which each worker's clock is off; there are as many workers."""
API_CLOCK = 600.0
START_SECONDS = 60.0
GRACE_SECONDS = 15.0


class Program:
    """One of the shop's commands as a process, and what it has written."""

    def __init__(self, command: tuple[str, ...], log: Path, variables: dict[str, str]) -> None:
        self.log = log
        self._since = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
            self.process = spawn([sys.executable, "-m", *command], stdout=output, env=environment)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def says(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.log.read_bytes()[self._since :].decode())

    async def has_said(self, pattern: str) -> re.Match[str]:
        async with asyncio.timeout(START_SECONDS):
            while (found := self.says(pattern)) is None:
                if self.ended:
                    raise RuntimeError(f"it has ended: {self.log.read_text()[-2000:]}")
                await asyncio.sleep(0.05)  # another process writes it
        return found

    async def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(end, self.process, signal.SIGTERM, grace=GRACE_SECONDS)


class Worker:
    """A place for a worker, never empty for long."""

    def __init__(self, log: Path, variables: dict[str, str], clock: float, network: Network | None) -> None:
        self._log, self._variables = log, variables
        self._command = (CLOCK, str(clock), *WORKER)
        self.network = network
        """By which it reaches one of the servers; None if it reaches both without."""
        self.program = self._start()
        self._frozen = False
        self._keeping = asyncio.create_task(self._keep())

    @property
    def is_alive(self) -> bool:
        return not (self._frozen or self.program.ended)

    @property
    def is_working(self) -> bool:
        is_cut_off = self.network is not None and not self.network.up
        return self.is_alive and not is_cut_off and self.program.says(WORKING) is not None

    def kill(self) -> None:
        self.program.process.kill()

    async def freeze(self, seconds: float) -> None:
        process = self.program.process
        self._frozen = True
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send_signal(signal.SIGCONT)
            self._frozen = False

    async def stop(self) -> None:
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        await self.program.stop()

    def _start(self) -> Program:
        return Program(self._command, self._log, self._variables)

    async def _keep(self) -> None:
        while True:
            if self.program.ended:
                self.program = self._start()
            await asyncio.sleep(0.1)


class Stack:
    """Everything that the storm may do something to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.postgresql = PostgreSQL(directory / "postgresql", settings={"fsync": "off"})  # the machine never fails
        self.valkey = Valkey(directory / "valkey")
        self.workers: list[Worker] = []
        self.networks: dict[str, Network] = {}
        """Each leads one worker to one server: by the server's name."""
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Stack]:
        async with contextlib.AsyncExitStack() as exits:
            for server in (self.postgresql, self.valkey):
                await asyncio.to_thread(server.start)
                exits.push_async_callback(asyncio.to_thread, server.stop)
            variables = {"COORD_DATABASE_URL": self.postgresql.url, "COORD_REDIS_URL": self.valkey.url}
            command = (CLOCK, str(API_CLOCK), *API)
            api = Program(command, self.directory / "api.log", variables)
            exits.push_async_callback(api.stop)
            self.url = (await api.has_said(SERVING))[1]
            for name, variable in (("Redis", "COORD_REDIS_URL"), ("PostgreSQL", "COORD_DATABASE_URL")):
                network = self.networks[name] = await exits.enter_async_context(Network(variables[variable]).opened())
                network.up = True
                self._add(exits, variables | {variable: network.url}, network)
            self._add(exits, variables, None)
            for worker in self.workers:
                await worker.program.has_said(WORKING)
            yield self

    def _add(self, exits: contextlib.AsyncExitStack, variables: dict[str, str], network: Network | None) -> None:
        number = len(self.workers)
        worker = Worker(self.directory / f"worker-{number + 1}.log", variables, CLOCKS[number], network)
        exits.push_async_callback(worker.stop)
        self.workers.append(worker)

    async def flush_redis(self) -> None:
        async with redis.asyncio.Redis.from_url(self.valkey.url) as client:
            await client.flushall()
