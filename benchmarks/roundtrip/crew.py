"""The processes of a turn: started in a contender's environment, told what to do, and gone when the turn is over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from asyncio.subprocess import PIPE
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from benchmarks.machine import ROOT

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from pathlib import Path

    from benchmarks.roundtrip.orders import Scene

LONGEST_ANSWER = 1 << 26
"""Bytes of a line."""


class TurnError(RuntimeError):
    """A process of a turn has failed; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Member:
    process: Process
    log: Path

    async def ask(self, command: str, within: float, **arguments: Any) -> Any:
        """Its answer, after at most `within` seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        try:
            async with asyncio.timeout(within):
                answer = await self.process.stdout.readline()
        except TimeoutError:
            raise self._failure(f"gave no answer to {command} in {within:.0f} s") from None
        if not answer:
            raise self._failure(f"ended during {command}")
        return json.loads(answer)

    def _failure(self, what: str) -> TurnError:
        last = self.log.read_text(errors="replace").splitlines()[-15:]
        return TurnError("\n".join([f"{self.log.stem} {what}", *last]))


class Crew:
    """All of them are killed at the end of the block; should this process be killed first, they notice."""

    def __init__(self, python: Path, path: str, scene: Scene, logs: Path, *, root: Path = ROOT) -> None:
        self._python = python
        self._root = root
        self._path = path
        self._scene = json.dumps(asdict(scene))
        self._logs = logs
        self.workers: list[Member] = []
        self.requesters: list[Member] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in (*self.requesters, *self.workers):
            with suppress(ProcessLookupError):
                os.killpg(member.process.pid, signal.SIGKILL)
        for member in (*self.requesters, *self.workers):
            await member.process.wait()

    async def add_worker(self) -> None:
        self.workers.append(await self._start("worker", len(self.workers)))

    async def add_requester(self) -> Member:
        """Each takes ids of its own for its orders."""
        self.requesters.append(await self._start("requester", len(self.requesters)))
        return self.requesters[-1]

    async def _start(self, role: str, number: int) -> Member:
        log = self._logs / f"{role} {number + 1} of {self._path}.log"
        command = ["-m", "benchmarks.roundtrip.side", role, self._path, self._scene, str(1 + number * 10_000_000)]
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                self._python,
                *command,
                cwd=self._root,
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors,
                limit=LONGEST_ANSWER,
                start_new_session=True,  # a terminal's Ctrl-C does not reach it
            )
        return Member(process, log)
