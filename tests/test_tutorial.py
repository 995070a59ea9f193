"""The tutorial does what it says: its files, as they are on the page, run by its own commands in an empty directory."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.clusters import lay
from tests.pages import FILE, blocks
from tests.project import Dev, processes_in, until
from tests.shop import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = ROOT / "docs" / "tutorial.md"
COMMANDS = [block.text.strip() for block in blocks(PAGE, "sh")]
DEV = next(command for command in COMMANDS if command.startswith("coord dev"))


@contextmanager
def followed(directory: Path) -> Iterator[Dev]:
    """The tutorial up to "Run it", with the servers that `coord dev` brings."""
    files = [(match[1], block.text) for block in blocks(PAGE, "python") if (match := FILE.match(block.text))]
    assert len(files) == len(blocks(PAGE, "python"))
    for name, text in files:
        (directory / name).write_text(text)
    lay(directory / ".coord/postgresql")
    dev = Dev(directory, *shlex.split(DEV.removeprefix("coord dev --app api:app --worker worker.Settings")))
    try:
        until(lambda: "ready at" in dev.output, lambda: dev.output, within=60)
        yield dev
    finally:
        dev.process.send_signal(signal.SIGINT)
        dev.status(within=40)


def run(command: str, directory: Path, port: int) -> str:
    environment = os.environ | {"TICKETS_URL": f"http://127.0.0.1:{port}"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    ended = subprocess.run(
        command, check=False, shell=True, cwd=directory, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_tutorial_ends_with_an_endpoint_that_waits_and_a_test_that_passes(tmp_path: Path) -> None:
    with followed(tmp_path) as dev:
        curl = next(command for command in COMMANDS if command.startswith("curl"))
        (answer,) = blocks(PAGE, "json")
        assert run(curl, tmp_path, dev.port) == answer.text.strip()
        listing = next(command for command in COMMANDS if command.startswith("coord jobs"))
        listed = run(re.sub(r"'.*'", dev.says(r"COORD_DATABASE_URL=(\S+)")[1], listing), tmp_path, dev.port)
        assert re.search(r"give_seat +done", listed)
        test = next(command for command in COMMANDS if command.startswith("pytest"))
        assert re.search(r"^=+ 1 passed", run(test, tmp_path, dev.port), re.MULTILINE)


def test_no_ticket_is_lost_and_none_unseated_when_a_worker_is_killed_as_the_tutorial_says(tmp_path: Path) -> None:
    sell, kill = (next(command for command in COMMANDS if command.startswith(word)) for word in ("for", "kill"))
    with followed(tmp_path) as dev, ThreadPoolExecutor(1) as pool:
        pids = processes_in(tmp_path)
        pattern = re.search(r"pgrep -of '(.*)'", kill)
        assert pattern is not None
        killed = min(pid for pid, command in pids.items() if re.search(pattern[1], command))
        selling = pool.submit(run, sell, tmp_path, dev.port)
        until(lambda: "POST /tickets" in dev.output, lambda: dev.output)
        os.kill(killed, signal.SIGKILL)  # of this project's alone, which pgrep would not know
        tickets = [json.loads(line) for line in selling.result().splitlines()]
        dev.says(r"coord +\| worker-[12] was ended by SIGKILL; it starts again")
    assert [(ticket["status"], ticket["seat"]) for ticket in tickets] == [("seated", n) for n in range(1, 101)]


def test_the_tutorial_names_every_command_that_is_run() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["mkdir", "coord", "curl", "coord", "pytest", "for", "kill"]
