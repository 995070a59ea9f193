"""One of the shop's commands as a process, and what it has written."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

from coord.dev.process import end, spawn
from tests.shop import ROOT

if TYPE_CHECKING:
    from pathlib import Path

CLOCK = "tests.chaos.clock"
START_SECONDS = 60.0
GRACE_SECONDS = 15.0


class Program:
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
