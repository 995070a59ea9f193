"""`python -m arq …`, `python -m uvicorn …` and `python -c …` without the second that their imports take.

A server forks them: a process that has imported what each of them imports, and nothing of the tests' or the shop's own.
What comes out is a process like any other, with its own pid, environment, arguments, directory and output, which can be
killed and frozen; that it was forked is all that differs. Whatever still runs when the tests end, however they end, is
killed.

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

    def __init__(
        self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader, status: asyncio.StreamReader
    ) -> None:
        self.pid = pid
        self.stdout = stdout
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

    async def start(self, *command: str, env: Mapping[str, str], cwd: Path, reads_stdout: bool) -> Process:
        """The module `command[0]`, or after `-c` a text, with its arguments; its stderr is piped."""
        (stdout, out), (stderr, error), (status, told) = [await _piped() for _ in range(3)]
        request = json.dumps([command, dict(env), str(cwd), reads_stdout]).encode()
        socket.send_fds(self._control, [request], [out, error, told])
        for fd in (out, error, told):
            os.close(fd)
        return Process(int(await status.readline()), stdout, stderr, status)

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


async def start(*command: str, env: Mapping[str, str], cwd: Path = PROJECT, reads_stdout: bool = False) -> Process:
    """What it writes to stdout is lost unless it is read."""
    if not _servers:
        _servers.append(Server())
    return await _servers[0].start(*command, env=env, cwd=cwd, reads_stdout=reads_stdout)


async def ended(*command: str, env: Mapping[str, str], cwd: Path = PROJECT) -> tuple[int, str, str]:
    """Its status, and what it has written to stdout and stderr. One that is not waited for to its end is killed."""
    process = await start(*command, env=env, cwd=cwd, reads_stdout=True)
    try:
        out, error, status = await asyncio.gather(process.stdout.read(), process.stderr.read(), process.wait())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    return status, out.decode(), error.decode()


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
        request, (stdout, stderr, status) = _received(control, running)
        if (pid := os.fork()) == 0:
            for fd in (status, *running.values()):
                os.close(fd)
            control.close()
            return _become(stdout, stderr, *json.loads(request))
        os.close(stdout)
        os.close(stderr)
        os.write(status, f"{pid}\n".encode())
        running[pid] = status
        reap()  # who ended before he was known


def _received(control: socket.socket, running: Mapping[int, int]) -> tuple[bytes, list[int]]:
    request, fds, *_ = socket.recv_fds(control, MAX_REQUEST_BYTES, 3)
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


def _become(
    stdout: int, stderr: int, command: list[str], env: dict[str, str], cwd: str, reads_stdout: bool
) -> list[str]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for theirs, ours in ((nothing, 0), (stdout if reads_stdout else nothing, 1), (stderr, 2)):
        os.dup2(theirs, ours)
    for fd in (nothing, stdout, stderr):
        os.close(fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0] = cwd
    return command


if __name__ == "__main__":
    gc.disable()
    for _name in IMPORTED:
        importlib.import_module(_name)
    gc.freeze()  # so that what is shared stays so
    _module, *sys.argv[1:] = serve(socket.socket(fileno=int(sys.argv[1])))
    gc.enable()
    if _module == "-c":
        sys.argv[0] = "-c"
        exec(compile(sys.argv.pop(1), "<string>", "exec", dont_inherit=True), {"__name__": "__main__"})  # noqa: S102 - as Python does
    else:
        runpy.run_module(_module, run_name="__main__", alter_sys=True)
