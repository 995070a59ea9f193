"""The whole shop on this machine, through `coord dev`, its output in a file."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coord.dev.process import end, spawn
from demo.report import LOG, starting

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

DATA = Path(".coord/demo")
WORKERS = 2
START_SECONDS, STOP_SECONDS = 90.0, 45.0


class StackError(Exception):
    """The stack did not start, or ended by itself."""


@dataclass(frozen=True, slots=True)
class Stack:
    url: str
    database_url: str
    process: subprocess.Popen[bytes]

    def ended(self) -> bool:
        return self.process.poll() is not None


@contextmanager
def running(port: int) -> Iterator[Stack]:
    """The stack, answering; stopped in good order when the block ends, or when this process is killed."""
    LOG.parent.mkdir(exist_ok=True)
    options = ["--app", "api:app", "--worker", "worker.Settings", "--workers", str(WORKERS), "--port", str(port)]
    command = [sys.executable, "-m", "coord.cli", "dev", *options, "--data", str(DATA)]
    with LOG.open("wb") as log:
        process = spawn(command, stdout=log, at_parent_death=signal.SIGTERM)
    try:
        with starting(f"PostgreSQL, Valkey, {WORKERS} workers and the API"):
            stack = _when_ready(process)
        yield stack
    finally:
        end(process, signal.SIGTERM, grace=STOP_SECONDS)


def _when_ready(process: subprocess.Popen[bytes]) -> Stack:
    deadline = time.monotonic() + START_SECONDS
    while not (ready := re.search(r"ready at (http://[^\s,]+)", text := LOG.read_text(errors="replace"))):
        if process.poll() is not None or time.monotonic() > deadline:
            last = LOG.read_text(errors="replace").splitlines()[-1:]
            raise StackError(", ".join(["the stack did not start", *last]))
        time.sleep(0.05)
    started = re.search(r"COORD_DATABASE_URL=(\S+)", text)
    return Stack(ready[1], started[1] if started else os.environ["COORD_DATABASE_URL"], process)
