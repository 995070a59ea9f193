"""`coord dev`: a project's API and workers, with a PostgreSQL and a Valkey of their own, in one terminal.

Started in the order servers, workers, API, and stopped in the opposite one: on Ctrl-C, SIGTERM or a closed terminal,
or because one of them ended, which is always an error. A URL that is set in the environment replaces its server.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import importlib.util
import itertools
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
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from coord.dev.server import Server

API = "api"
DATABASE_URL, REDIS_URL = "COORD_DATABASE_URL", "COORD_REDIS_URL"
API_GRACE, WORKER_GRACE = 10.0, 30.0
SAME_INTERRUPT = 1.0
COLOURS = (36, 33, 32, 35, 34, 31)


class DevError(Exception):
    """Ends `coord dev` with status 1 and this line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    app: str | None = None
    worker: str | None = None
    workers: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    data: Path = Path(".coord")
    reload: bool = False
    servers_only: bool = False


def run(options: Options) -> int:
    """Return when everything has stopped: 0 if that was asked for."""
    try:
        if not options.servers_only:
            _require_uvicorn()
        port = options.port if options.servers_only else _usable_port(options.host, options.port)
        Development(options, port).run()
    except (DevError, ServerError, ImportError, OSError) as error:
        print(f"coord dev: {error}", file=sys.stderr)
        return 1
    return 0


class Development:
    """Everything that `coord dev` runs. Nothing of it is left when `run` returns or raises."""

    def __init__(self, options: Options, port: int) -> None:
        self.host, self.port, self.data = options.host, port, options.data
        self.commands = _commands(options, port)
        self.terminal = Terminal(["coord", *self.commands])
        self.servers = _servers(options.data)
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COORD_DEVELOPMENT": "1"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.readers: list[threading.Thread] = []
        self.stop_began: float | None = None
        self.reload = options.reload

    def run(self) -> None:
        logging.getLogger("coord").addHandler(self.terminal)
        _handle_stop_signals(self._interrupt)
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
                _handle_stop_signals(signal.SIG_IGN)  # one more Ctrl-C while the interpreter exits is no error

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
            self.environment[variable] = server.start().url
            self.terminal.line("coord", f"{variable}={server.url}")
        self._spawn()

    def _spawn(self) -> None:
        for name, command in self.commands.items():
            process = spawn(command, stdout=subprocess.PIPE, env=self.environment)
            self.processes[name] = process
            reader = threading.Thread(target=self.terminal.follow, args=(name, process.stdout), daemon=True)
            reader.start()
            self.readers.append(reader)

    def _watch(self) -> None:
        """Return only by raising: none of them is meant to end before it is told to."""
        ready = not self.commands
        if ready:
            self.terminal.line("coord", "the servers are up, Ctrl-C stops")
        sources = _sources() if self.reload else {}
        while True:
            if self.reload and sources != (sources := _sources()):
                self.terminal.line("coord", "a file has changed; the programs start again")
                self._end_programs()
                self._spawn()
                ready = False
            if death := self._first_death():
                raise DevError(death)
            if not ready and _answers(self.host, self.port):
                ready = True
                self.terminal.line("coord", f"ready at {_url(self.host, self.port)}, Ctrl-C stops")
            time.sleep(0.1)

    def _first_death(self) -> str | None:
        """Programs end when their server does, so a server's end, looked for after theirs, is the one to report."""
        ended = {name: status for name, process in self.processes.items() if (status := process.poll()) is not None}
        for server in self.servers.values():
            if (status := server.exit_status) is not None:
                return f"{server.name} {_ending(status)}; its log is {server.log}"
        return next((f"{name} {_ending(status)}" for name, status in ended.items()), None)

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
        width = max(map(len, names))
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._leads = {name: f"{name:{width}} | " for name in names}
        if coloured:
            pairs = zip(names, itertools.cycle(COLOURS), strict=False)
            self._leads = {name: f"\x1b[{colour}m{self._leads[name]}\x1b[0m" for name, colour in pairs}
        self._whole = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        self.line("coord", record.getMessage())

    def line(self, name: str, text: str) -> None:
        # A reader that went away (`| head`) ends nothing: the others must not block on a pipe that nobody empties.
        with self._whole, contextlib.suppress(OSError):
            print(self._leads[name] + text, flush=True)

    def follow(self, name: str, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self.line(name, line.decode(errors="replace").rstrip("\r\n"))


def _servers(data: Path) -> dict[str, Server]:
    """The servers to start, by the variable that would replace them, in the order of starting."""
    servers: dict[str, Server] = {}
    if not os.environ.get(DATABASE_URL):
        servers[DATABASE_URL] = PostgreSQL(data / "postgresql")
    if not os.environ.get(REDIS_URL):
        servers[REDIS_URL] = Valkey(data / "valkey", persist=True)
    return servers


def _commands(options: Options, port: int) -> dict[str, list[str]]:
    if options.servers_only or options.app is None or options.worker is None:
        return {}
    module = [sys.executable, "-m"]
    workers = {f"worker-{number + 1}": [*module, "arq", options.worker] for number in range(options.workers)}
    address = ["--host", options.host, "--port", str(port)]
    # Streams never end by themselves: without a limit, the first open one would keep uvicorn until it is killed.
    return {**workers, API: [*module, "uvicorn", options.app, *address, "--timeout-graceful-shutdown", "5"]}


def _sources() -> dict[Path, float]:
    """When each Python file beneath this directory was last changed; not those in hidden directories."""
    found = {}
    for directory, names, files in os.walk("."):
        names[:] = [name for name in names if not name.startswith(".") and name not in ("__pycache__", "node_modules")]
        for file in files:
            path = Path(directory, file)
            with contextlib.suppress(OSError):  # it may be gone again
                if path.suffix == ".py":
                    found[path] = path.stat().st_mtime
    return found


def _handle_stop_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


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


def _require_uvicorn() -> None:
    if importlib.util.find_spec("uvicorn") is None:
        raise DevError("uvicorn is missing: pip install uvicorn")


def _usable_port(host: str, port: int) -> int:
    """Refuse a port that is taken before anything is started."""
    if port == 0:
        return free_port()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise DevError(f"cannot listen on {host}:{port}: {reason}; choose another with --port") from None
    return port


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _url(host: str, port: int) -> str:
    name = _reachable(host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=1.0)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("HEAD", "/")
        connection.getresponse()
        return True
    return False


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
