"""A proof as a user runs it: from a test suite of their own, with the page's files, and what it says when it fails."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as NotConnectedError

import coord.testing.proof.client
from coord import task_options
from coord.dev.server import ServerError, free_port
from coord.testing.history import RULES, Complaint, HistoryFile, Operation, Recorder
from coord.testing.proof import Application, prove
from coord.testing.proof.client import IN_THE_CALM, GaveUp, Visit
from coord.testing.proof.links import Link
from coord.testing.proof.prove import LATE_SECONDS, settled
from coord.testing.proof.stack import Stack
from tests.ledger import a_task
from tests.pages import FILE, blocks
from tests.shop import ROOT
from tests.workers import Office, working

if TYPE_CHECKING:
    import asyncpg

PAGE = ROOT / "docs" / "proof.md"
APPLICATION, PROOF = "booking.py", "test_proof.py"


def project(directory: Path, given: str) -> str:
    """The page's files, an application and a proof of it with this given; the proof's name."""
    files = {match[1]: block.text for block in blocks(PAGE, "python") if (match := FILE.match(block.text))}
    for name, text in files.items():
        (directory / name).write_text(text)
    assert [*files] == [APPLICATION, PROOF]
    assert files[PROOF].count("seconds=20") == 1
    (directory / PROOF).write_text(files[PROOF].replace("seconds=20", given))
    return PROOF


def run_by_its_user(directory: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "--rootdir", str(directory), name]
    return subprocess.run(command, cwd=directory, check=False, capture_output=True, text=True)


def left_by(output: str) -> Path:
    """The directory that a proof has named in the end."""
    found = re.search(r"the history is (/\S+)/history\.jsonl", output)
    assert found is not None, output
    return Path(found[1])


async def test_what_a_client_chooses_does_not_depend_on_how_often_it_had_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a seed repeats what the clients of a proof do."""
    monkeypatch.setattr(coord.testing.proof.client, "GIVE_UP_SECONDS", 0.0)
    monkeypatch.setattr(coord.testing.proof.client, "PAUSE_SECONDS", (0.01, 0.01))
    nobody = f"http://127.0.0.1:{free_port()}"
    with Recorder(tmp_path / "history.jsonl") as recorder:
        async with httpx.AsyncClient(base_url=nobody, trust_env=False) as http:
            first, other = (Visit(1, 2, http, recorder, lambda: 1, lambda _: None) for _ in range(2))
            with pytest.raises(GaveUp):
                await first.ask("GET", "/")
            monkeypatch.setattr(coord.testing.proof.client, "GIVE_UP_SECONDS", 0.1)
            with pytest.raises(GaveUp):
                await other.ask("GET", "/")
    assert first.random.random() == other.random.random()


async def test_a_client_gives_up_for_what_was_asked_in_the_calm_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a long storm one of thousands meets a fault with every request, which says nothing of the application."""
    monkeypatch.setattr(coord.testing.proof.client, "GIVE_UP_SECONDS", 0.0)
    monkeypatch.setattr(coord.testing.proof.client, "PAUSE_SECONDS", (0.001, 0.001))
    calm = iter([*range(20), *[20] * 100])
    asked: list[Operation] = []
    with Recorder(tmp_path / "history.jsonl") as recorder:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{free_port()}", trust_env=False) as http:
            with pytest.raises(GaveUp):
                await Visit(1, 2, http, recorder, lambda: next(calm), asked.append).ask("GET", "/")
    assert [each.calm for each in asked] == [False] * 10 + [True] * IN_THE_CALM
    assert Counter(type(record) for record in HistoryFile(tmp_path / "history.jsonl"))[Complaint] == 1


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(200)
def test_the_proof_of_the_page_holds_for_its_application(tmp_path: Path) -> None:
    ended = run_by_its_user(tmp_path, project(tmp_path, "seconds=8"))
    assert ended.returncode == 0, ended.stdout
    assert "everything holds; seed " in ended.stdout
    assert re.search(r"faults +\d+ × ", ended.stdout)
    for rule in RULES:
        assert f"✓ {rule} " in ended.stdout
    left = left_by(ended.stdout)
    assert {"history.jsonl", "api.log", "worker-1.log", "worker-2.log"} <= {path.name for path in left.iterdir()}
    assert [path.name for path in (left / "postgresql").iterdir()] == ["postgresql.log"]
    assert [path.name for path in (left / "valkey").iterdir()] == ["valkey.log"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_proof_of_an_application_with_a_bug_of_its_own_says_what_is_broken(tmp_path: Path) -> None:
    name = project(tmp_path, "seconds=0.5, pace=80, faults=[]")
    application = tmp_path / APPLICATION
    application.write_text(application.read_text().replace(", lock_tables(session, [Booking]):", ":"))
    ended = run_by_its_user(tmp_path, name)
    assert ended.returncode == 1, ended.stdout
    assert re.search(r"BROKEN: .*; seed \d+ repeats it, the history is /", ended.stdout)
    assert (left_by(ended.stdout) / "postgresql/data").exists()


def test_a_proof_without_a_second_worker_is_refused(tmp_path: Path) -> None:
    alone = Application(api=["uvicorn", "booking:app"], workers=[["arq", "booking.Settings"]])

    async def nothing(*_: object) -> None: ...

    proof = prove(alone, nothing, effect_of=lambda *_: None, read=nothing, directory=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a proof needs two workers"):
        proof.send(None)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("api", "worker", "broken", "log"),
    [
        ("shop:misspelt", ["http.server", "0"], "uvicorn shop:misspelt", "api.log"),
        ("shop:app", ["arq", "shop.Misspelt"], "arq shop.Misspelt", "worker-1.log"),
    ],
    ids=["api", "worker"],
)
@pytest.mark.timeout(55)
async def test_a_process_that_does_not_start_is_named_within_seconds_with_the_end_of_its_log(
    tmp_path: Path, api: str, worker: list[str], broken: str, log: str
) -> None:
    (tmp_path / "shop.py").write_text("async def app(scope, receive, send):\n    assert scope['type'] == 'http'\n")
    application = Application(api=["uvicorn", api, "--port", "{port}"], workers=[worker], directory=tmp_path)
    said = rf"`python -m {broken}.* has ended \d+ times; .*/{log} ends:\n(.*\n)*.*Error"
    with pytest.raises(ServerError, match=said):
        async with Stack(application, tmp_path).running():
            pass


async def test_a_proof_waits_for_what_is_due_in_time_and_for_nothing_that_is_due_tomorrow(
    office: Office, observer: asyncpg.Connection
) -> None:
    soon = await office.enqueue(task_options(a_task, delay=2))
    for _ in range(2):
        await office.enqueue(task_options(a_task, delay=timedelta(days=1)))
    async with asyncio.timeout(20), working(office, [a_task]):
        assert await settled(observer, 30.0) == 2
    assert (await office.row(soon)).state == "done"


def test_the_page_has_every_rule_as_the_checker_says_it() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert rows == RULES
    assert f"late={LATE_SECONDS}" in PAGE.read_text()


async def test_a_link_that_is_cut_ends_connections_and_refuses_new_ones(redis_url: str) -> None:
    async with Link(redis_url).opened() as link, Redis.from_url(link.url, retry=None) as client:
        assert await client.ping()
        await link.cut(0)
        assert link.up
        link.up = False
        with pytest.raises(NotConnectedError):
            await client.ping()
        link.up = True
        assert await client.ping()


def test_a_history_is_iterated_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "history").write_text("")
    history = HistoryFile(tmp_path / "history")
    assert [*history] == [*history] == []
