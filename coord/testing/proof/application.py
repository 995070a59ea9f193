"""How an application is started, and each of its processes."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from coord.dev.process import end, spawn
from coord.dev.server import ServerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GRACE_SECONDS = 15.0
RESTART_SECONDS = 0.1
"""Between two looks whether a process has ended."""
LAST_LINES = 15
"""Of a process's log, in an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """Commands for `python -m`; each becomes a process, which is started again whenever it ends."""

    api: Sequence[str]
    """With `{port}` where the port belongs."""
    workers: Sequence[Sequence[str]]
    directory: Path = field(default_factory=Path.cwd)
    """Where they are started, and from where they import."""
    environment: Mapping[str, str] = field(default_factory=dict)
    database_variable: str = "COORD_DATABASE_URL"
    redis_variable: str = "COORD_REDIS_URL"


class Process:
    """One command; what it writes goes to a file."""

    def __init__(self, command: Sequence[str], application: Application, log: Path, urls: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", *command]
        self._application = application
        self._log = log
        path = os.pathsep.join(filter(None, [str(application.directory), os.environ.get("PYTHONPATH")]))
        self._environment = {**os.environ, "PYTHONPATH": path, **application.environment, **urls}
        self._frozen = False
        self.ends = 0
        """How often it has ended, and was started again."""
        self._start()
        self._keeping = asyncio.create_task(self._keep(), name="coord proof keeps a process")

    def _start(self) -> None:
        with self._log.open("ab") as output:
            self._process = spawn(
                self._command, stdout=output, env=self._environment, directory=self._application.directory
            )

    async def _keep(self) -> None:
        while True:
            if self._process.poll() is not None:
                self.ends += 1
                self._start()
            await asyncio.sleep(RESTART_SECONDS)

    def failure(self, what: str) -> ServerError:
        """An error that says where its log is, and how that ends."""
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        return ServerError(f"`python -m {shlex.join(self._command[2:])}` {what}; {self._log} ends:\n{tail}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._frozen and self._process.poll() is None

    async def kill(self) -> None:
        """Return when it is dead."""
        process = self._process
        process.kill()
        await asyncio.to_thread(process.wait)

    async def freeze(self, seconds: float) -> None:
        process, self._frozen = self._process, True
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send_signal(signal.SIGCONT)
            self._frozen = False

    async def stop(self) -> None:
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        await asyncio.to_thread(end, self._process, signal.SIGTERM, grace=GRACE_SECONDS)
