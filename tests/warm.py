"""`python -m arq …` and `python -m uvicorn …` without the second that their imports take.

A server forks them: a process that has imported what each of them imports, and nothing of the tests' or the shop's own.
What comes out is a process like any other, with its own pid, environment, arguments and stderr, which can be killed and
frozen; that it was forked is all that differs. Whatever still runs when the tests end, however they end, is killed.

Variables that Python itself reads (`PYTHON…`) are those of the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping

PROJECT = Path(__file__).parent.parent
IMPORTED = [
    "coord",
    "coord.http",
    "coord.console",
    "coord.worker.settings",
    "arq.cli",
    "httpx",
    "uvicorn.main",
    "uvloop",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "uvicorn.loops.auto",
    "uvicorn.lifespan.on",
    "coord.worker.lifecycle",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "redis.asyncio.sentinel",
]
MAX_REQUEST_BYTES = 1_000_000


class Process:
    """What `asyncio.create_subprocess_exec` gives, as far as the tests need it."""

    def __init__(self, pid: int, stderr: asyncio.StreamReader, status: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stderr = stderr
        self.returncode: int | None = None
        self._ending = asyncio.create_task(self._end(status), name=f"end of process {pid}")

    async def wait(self) -> int:
        await asyncio.wait([self._ending])
        return self._ending.result()

    def send_signal(self, number: int) -> None:
        """`ProcessLookupError` once it has ended, and that is known."""
        if self.returncode is not None:
            raise ProcessLookupError(self.pid)
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def _end(self, status: asyncio.StreamReader) -> int:
        self.returncode = int(await status.readline())
        return self.returncode


class Server:
    """The process that forks; started with the first command."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, cwd=PROJECT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    async def start(self, *command: str, env: Mapping[str, str]) -> Process:
        """The module `command[0]` with its arguments, in the project's directory; its stderr is piped."""
        (stderr, theirs), (status, told) = await _piped(), await _piped()
        socket.send_fds(self._control, [json.dumps([command, dict(env)]).encode()], [theirs, told])
        os.close(theirs)
        os.close(told)
        return Process(int(await status.readline()), stderr, status)

    def close(self) -> None:
        """End it, and with it every process that it has forked."""
        self._control.close()
        self._process.wait()


async def _piped() -> tuple[asyncio.StreamReader, int]:
    """What is written to a file descriptor, for another process to write to; closed at its end."""
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    pipe = os.fdopen(ours, "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, theirs


_servers: list[Server] = []


async def start(*command: str, env: Mapping[str, str]) -> Process:
    if not _servers:
        _servers.append(Server())
    return await _servers[0].start(*command, env=env)


def close() -> None:
    while _servers:
        _servers.pop().close()


# In the server


def serve(control: socket.socket) -> list[str]:
    """Fork for each request; returns in the child, which is what was asked for but for running it."""
    running: dict[int, int] = {}

    def reap(*_: object) -> None:
        for pid in [*running]:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                _tell(running.pop(pid), os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: it ends with the tests, after them
    signal.signal(signal.SIGCHLD, reap)
    while True:
        request, (stderr, status), *_ = _received(control, running)
        if (pid := os.fork()) == 0:
            for fd in (status, *running.values()):
                os.close(fd)
            control.close()
            return _become(stderr, *json.loads(request))
        os.close(stderr)
        os.write(status, f"{pid}\n".encode())
        running[pid] = status
        reap()  # who ended before he was known


def _received(control: socket.socket, running: Mapping[int, int]) -> tuple[bytes, list[int]]:
    request, fds, *_ = socket.recv_fds(control, MAX_REQUEST_BYTES, 2)
    if not request:
        _end(running)
    return request, fds


def _end(running: Mapping[int, int]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    sys.exit()


def _tell(status: int, code: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(status, f"{code}\n".encode())
    os.close(status)


def _become(stderr: int, command: list[str], env: dict[str, str]) -> list[str]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for theirs, ours in ((nothing, 0), (nothing, 1), (stderr, 2)):
        os.dup2(theirs, ours)
    os.close(nothing)
    os.close(stderr)
    os.environ.clear()
    os.environ.update(env)
    return command


if __name__ == "__main__":
    for _name in IMPORTED:
        importlib.import_module(_name)
    gc.freeze()  # so that what is shared stays so
    _module, *sys.argv[1:] = serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(_module, run_name="__main__", alter_sys=True)
