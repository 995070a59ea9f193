"""`coord dev`: a project's API and workers, with a PostgreSQL and a Valkey of their own, in one terminal.

Started in the order servers, workers, API, and stopped in the opposite one: on Ctrl-C, SIGTERM or a closed terminal,
or because one of them ended, which is always an error, but for a worker's end by `kill -9`: it is started again, as
whoever runs workers elsewhere does. A URL that is set in the environment replaces its server.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from coord.dev.embedded import PostgreSQL, ServerError, Valkey
from coord.dev.process import end, spawn
from coord.dev.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coord.dev.server import Server

API = "api"
DATABASE_URL, REDIS_URL = "COORD_DATABASE_URL", "COORD_REDIS_URL"
API_GRACE, WORKER_GRACE = 10.0, 30.0
SAME_INTERRUPT = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DevError(Exception):
    """Ends `coord dev` with status 1 and this line."""


@dataclass(slots=True, kw_only=True)
class Options:
    """Without `app` and `worker` the servers alone are started."""

    app: str | None
    worker: str | None
    workers: int
    host: str
    port: int
    data: Path
    reload: bool


def run(options: Options) -> int:
    """Return when everything has stopped: 0 if that was asked for."""
    try:
        if options.app is not None:
            if importlib.util.find_spec("uvicorn") is None:
                raise DevError("uvicorn is missing: pip install uvicorn")
            options.port = options.port or free_port()
            _refuse_taken_port(options.host, options.port)
        Development(options).run()
    except (DevError, ServerError, ImportError, OSError) as error:
        print(f"coord dev: {error}", file=sys.stderr)
        return 1
    return 0


class Development:
    """Everything that `coord dev` runs. Nothing of it is left when `run` returns or raises."""

    def __init__(self, options: Options) -> None:
        self.address: tuple[str, int] = (options.host, options.port)
        self.data: Path = options.data
        self.reload = options.reload
        self.commands = _commands(options)
        self.terminal = Terminal(["coord", *self.commands])
        self.servers: dict[str, Server] = {}
        """By the variable that would replace each, in the order of starting."""
        if not os.environ.get(DATABASE_URL):
            self.servers[DATABASE_URL] = PostgreSQL(self.data / "postgresql")
        if not os.environ.get(REDIS_URL):
            self.servers[REDIS_URL] = Valkey(self.data / "valkey", persist=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.readers: list[threading.Thread] = []
        self.stop_began: float | None = None

    def run(self) -> None:
        logging.getLogger("coord").addHandler(self.terminal)
        for number in SIGNALS:
            signal.signal(number, self._interrupt)
        with _locked(self.data) if self.servers else contextlib.nullcontext():
            try:
                self._start()
                self._watch()
            except KeyboardInterrupt:
                self.terminal.line("coord", "stopping")
            except DevError as error:
                self.terminal.line("coord", f"{error}; stopping")
                raise
            finally:
                self._stop()
                for number in SIGNALS:  # one more Ctrl-C while the interpreter exits is no error
                    signal.signal(number, signal.SIG_IGN)

    def _interrupt(self, *_: object) -> None:
        """Stop in order the first time, and at once the second time.

        One Ctrl-C may arrive twice, from the terminal and from a parent that passes it on; it still counts as one.
        """
        now = time.monotonic()
        if self.stop_began is None:
            self.stop_began = now
            raise KeyboardInterrupt
        if now > self.stop_began + SAME_INTERRUPT:
            for process in self.processes.values():
                process.kill()

    def _start(self) -> None:
        for variable, server in self.servers.items():
            server.start()
            self.terminal.line("coord", f"{variable}={server.url}")
        self._start_programs()

    def _start_programs(self) -> None:
        for name in self.commands:
            self._start_program(name)

    def _start_program(self, name: str) -> None:
        own = {variable: server.url for variable, server in self.servers.items()}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COORD_DEVELOPMENT": "1", **own}
        process = self.processes[name] = spawn(self.commands[name], stdout=subprocess.PIPE, env=environment)
        reader = threading.Thread(target=self.terminal.follow, args=(name, process.stdout), daemon=True)
        reader.start()
        self.readers.append(reader)

    def _start_killed_workers(self) -> None:
        for name, process in self.processes.items():
            if name != API and process.poll() == -signal.SIGKILL:
                self.terminal.line("coord", f"{name} {_ending(-signal.SIGKILL)}; it starts again")
                self._start_program(name)

    def _watch(self) -> None:
        """Return only by raising: none of them is meant to end before it is told to, but for who is being written."""
        sources = _sources() if self.reload else {}
        if not self.commands:
            self.terminal.line("coord", "the servers are up, Ctrl-C stops")
        ready = broken = not self.commands
        while True:
            if self.reload and sources != (sources := _sources()):
                self.terminal.line("coord", "a file has changed, the programs start again")
                self._end_programs()
                self._start_programs()
                ready = broken = False
            if death := self._servers_death():
                raise DevError(death)
            self._start_killed_workers()
            if not broken and (death := self._programs_death()):
                if not self.reload:
                    raise DevError(death)
                self.terminal.line("coord", f"{death}; the programs start again when a file changes")
                broken = True
            ready = ready or (not broken and self._is_ready())
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        """Whether the application answers, which is said then."""
        try:
            socket.create_connection(self.address, timeout=1.0).close()
        except OSError:
            return False
        host, port = self.address
        shown = f"[{host}]" if ":" in host else host
        self.terminal.line("coord", f"ready at http://{shown}:{port}, Ctrl-C stops")
        return True

    def _servers_death(self) -> str | None:
        for server in self.servers.values():
            if (status := server.exit_status) is not None:
                return f"{server.name} {_ending(status)}; its log is {server.log}"
        return None

    def _programs_death(self) -> str | None:
        """Programs end when their server does, so a server's end, looked for after theirs, is the one to report."""
        ended = {name: status for name, process in self.processes.items() if (status := process.poll()) is not None}
        return (ended and self._servers_death()) or next((f"{name} {_ending(ended[name])}" for name in ended), None)

    def _stop(self) -> None:
        self.stop_began = self.stop_began or time.monotonic()
        self._end_programs()
        for server in reversed(self.servers.values()):
            server.stop()
        for reader in self.readers:
            reader.join(1.0)
        if self.servers:
            self.terminal.line("coord", f"stopped; the data is kept in {self.data}")

    def _end_programs(self) -> None:
        workers = [process for name, process in self.processes.items() if name != API]
        if api := self.processes.get(API):
            end(api, signal.SIGTERM, grace=API_GRACE)
        if workers:
            with ThreadPoolExecutor(len(workers)) as pool:
                list(pool.map(lambda worker: end(worker, signal.SIGTERM, grace=WORKER_GRACE), workers))


class Terminal(logging.Handler):
    """Whole lines of many processes, each led by the name of its own; what coord itself logs among them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._width = max(map(len, names))
        self._whole = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        self.line("coord", record.getMessage())

    def line(self, name: str, text: str) -> None:
        # A reader that went away (`| head`) ends nothing: the others must not block on a pipe that nobody empties.
        with self._whole, contextlib.suppress(OSError):
            print(f"{name:{self._width}} | {text}", flush=True)

    def follow(self, name: str, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self.line(name, line.decode(errors="replace").rstrip("\r\n"))


def _commands(options: Options) -> dict[str, list[str]]:
    if options.app is None or options.worker is None:
        return {}
    module = [sys.executable, "-m"]
    workers = {f"worker-{number + 1}": [*module, "arq", options.worker] for number in range(options.workers)}
    address = ["--host", options.host, "--port", str(options.port)]
    # Streams never end by themselves: without a limit, the first open one would keep uvicorn until it is killed.
    return {**workers, API: [*module, "uvicorn", options.app, *address, "--timeout-graceful-shutdown", "5"]}


def _sources() -> dict[Path, float]:
    """When each Python file beneath this directory was last changed, but for hidden directories and environments."""
    found = {}
    for directory, names, files in os.walk("."):
        own = "pyvenv.cfg" not in files
        names[:] = [name for name in names if own and not name.startswith(".") and name != "__pycache__"]
        for path in (Path(directory, file) for file in files if file.endswith(".py")):
            with contextlib.suppress(OSError):  # it may be gone again
                found[path] = path.stat().st_mtime
    return found


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Keep a second `coord dev` off the directory."""
    data.mkdir(parents=True, exist_ok=True)
    (data / ".gitignore").write_text("*\n")
    with (data / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DevError(f"{data} is in use by another coord dev, process {lock.read()}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _refuse_taken_port(host: str, port: int) -> None:
    """Before anything is started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise DevError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
