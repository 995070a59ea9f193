"""A small project of a user's own, and `coord dev` run in it as a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coord.dev.server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

API = """
import json, os

async def answer():
    import asyncpg
    from arq import create_pool
    from arq.connections import RedisSettings
    connection = await asyncpg.connect(os.environ["COORD_DATABASE_URL"].replace("+asyncpg", ""))
    await connection.execute("CREATE TABLE IF NOT EXISTS visits (at timestamptz DEFAULT now())")
    await connection.execute("INSERT INTO visits DEFAULT VALUES")
    visits = await connection.fetchval("SELECT count(*) FROM visits")
    await connection.close()
    pool = await create_pool(RedisSettings.from_dsn(os.environ["COORD_REDIS_URL"]))
    job = await pool.enqueue_job("double", 21)
    doubled = await job.result(timeout=10, poll_delay=0.05)
    await pool.aclose()
    urls = [os.environ["COORD_DATABASE_URL"], os.environ["COORD_REDIS_URL"]]
    return {"visits": visits, "doubled": doubled, "urls": urls}

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    endless = scope["path"] == "/endless"
    body = json.dumps(await answer()).encode() if scope["path"] == "/trip" else b"first"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": endless})
    if endless:
        while True:
            await receive_nothing()

async def receive_nothing():
    import asyncio
    await asyncio.sleep(3600)
"""

WORKER = """
import os, signal, subprocess
from arq.connections import RedisSettings

async def double(ctx, number):
    return 2 * number

async def startup(ctx):
    if "STUBBORN" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctx["child"] = subprocess.Popen(["sleep", "3600"])
        print("stubborn", flush=True)

class Settings:
    functions = [double]
    on_startup = startup
    poll_delay = 0.05
    redis_settings = RedisSettings.from_dsn(os.environ["COORD_REDIS_URL"])
"""


def until(condition: Callable[[], Any], what: Callable[[], str] | str, within: float = 20.0) -> Any:
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {within} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.05)
    return found


def processes_in(directory: Path) -> dict[int, str]:
    """Command lines by pid of what runs in the directory; dead processes that nobody has waited for are in none."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(directory):
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
    return found


class Dev:
    """One `coord dev` as a process; its output goes to a file, so that it never waits for its reader."""

    def __init__(self, project: Path, *arguments: str, python: str = sys.executable, **environment: str) -> None:
        self.project = project
        self.port = free_port()
        self.log = project / f"output-{self.port}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("COORD_")}
        command = [python, "-m", "coord.cli", "dev", "--app", "api:app", "--worker", "worker.Settings"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *arguments],
                cwd=project,
                env={**clean, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until its output has the pattern."""
        found = until(lambda: re.search(pattern, self.output), lambda: f"{pattern!r} in:\n{self.output}")
        assert isinstance(found, re.Match)
        return found

    def ready(self) -> Dev:
        self.says(rf"coord +\| ready at http://127\.0\.0\.1:{self.port}\b")
        return self

    def trip(self) -> dict[str, Any]:
        """What the application answers, after a write to its database and a job done by its worker."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/trip", timeout=20) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def child(self, word: str) -> int:
        """The pid of the first of its processes whose command line has the word."""
        found = processes_in(self.project).items()
        return min(pid for pid, command in found if word in command and pid != self.process.pid)

    def status(self, within: float = 20.0) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"coord dev did not end within {within} s:\n{self.output}")
