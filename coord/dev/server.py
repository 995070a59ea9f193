"""A server program as a child of this process: started on a free port, watched until it accepts, stopped in order."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from coord.dev.process import Owner, end, spawn

if TYPE_CHECKING:
    import signal
    import subprocess
    from collections.abc import Sequence
    from pathlib import Path

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 20.0
# Below the ephemeral ranges of Linux and macOS: no outgoing connection can take the port while the server restarts.
PORTS = range(10_000, 32_000)
PORT_TAKEN = "Address already in use"
STILL_STOPPING = ('lock file "postmaster.pid" already exists', "pre-existing shared memory block")

StopMode = Literal["fast", "immediate"]


class ServerError(RuntimeError):
    """The server did not start; the message ends with the last lines of its log."""


class Server(ABC):
    """What the two servers share. One object may be started and stopped again and again, and keeps its port."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    crash_signal: ClassVar[signal.Signals]
    """Ends it at once; also sent when its parent dies."""

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        self.directory = directory.resolve()
        self.log = self.directory / f"{self.name}.log"
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Known from the first start on, unless it was given."""
        if self._port is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._port

    @property
    @abstractmethod
    def url(self) -> str: ...

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs, or when it was stopped; minus the signal's number when a signal ended it."""
        return None if self._process is None else self._process.poll()

    def start(self) -> Self:
        """Return when the server accepts connections; `ServerError` when it does not within a minute."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} is already started")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._prepare()
        deadline = time.monotonic() + START_SECONDS
        while not self._try_port(self._port or free_port(), deadline):
            time.sleep(0.1)
        return self

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop in good order, or with "immediate" as a crash would. Does nothing when it is not running."""
        if self._process is not None:
            signals = (self.stop_signal, self.crash_signal) if mode == "fast" else (self.crash_signal,)
            end(self._process, *signals, grace=STOP_SECONDS)
            self._process = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start, on the same port."""
        self.stop(mode)
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare(self) -> None:  # noqa: B027 - most need nothing
        """Make what the program expects to find in its directory."""

    @abstractmethod
    def _command(self, port: int) -> Sequence[str | Path]: ...

    @abstractmethod
    def _accepts(self, process: subprocess.Popen[bytes], port: int) -> bool:
        """Whether this very process, not another that won the port, accepts connections."""

    def _owner(self) -> Owner | None:
        return None

    def _spawn(self, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        env = {**os.environ, "LC_ALL": "C"}
        with self.log.open("ab") as log:
            return spawn(command, stdout=log, env=env, owner=self._owner(), at_parent_death=self.crash_signal)

    def _try_port(self, port: int, deadline: float) -> bool:
        """One attempt; False asks for another, because a race was lost or a predecessor is still stopping."""
        offset = self._log_size()
        process = self._spawn(self._command(port))
        try:
            while process.poll() is None and not self._accepts(process, port):
                if time.monotonic() > deadline:
                    raise self._failure(f"did not accept connections within {START_SECONDS:.0f} s", offset)
                time.sleep(0.01)
        except BaseException:
            end(process, grace=0)
            raise
        if process.poll() is None:
            self._process, self._port = process, port
            return True
        output = self._output_since(offset)
        lost_race = self._port is None and PORT_TAKEN in output
        if time.monotonic() < deadline and (lost_race or any(reason in output for reason in STILL_STOPPING)):
            return False
        raise self._failure(f"exited with status {process.returncode}", offset)

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _output_since(self, offset: int) -> str:
        return self.log.read_bytes()[offset:].decode(errors="replace")

    def _failure(self, what: str, offset: int) -> ServerError:
        tail = "\n".join(self._output_since(offset).splitlines()[-20:])
        return ServerError(f"{self.name} {what}; {self.log} ends:\n{tail}")


def free_port() -> int:
    """A port nobody listens on at this moment."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise ServerError(f"none of a hundred ports tried in {PORTS.start}–{PORTS.stop} is free")
