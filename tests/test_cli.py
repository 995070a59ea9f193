"""`coord` on the command line: what there is, what can be done, and what scripts can rely on."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
from typing import Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import create_async_engine

from coord import Job, JobState, cancel_job, enqueue
from coord.cli import COMMANDS, main
from coord.cli.jobs import _ended
from coord.jobs.ids import new_id
from tests.ledger import a_task
from tests.workers import Office, working


async def fail(ctx: dict[str, Any]) -> None:
    raise ValueError("no\nstock")


class Terminal:
    def __init__(self, office: Office, capsys: pytest.CaptureFixture[str]) -> None:
        self._url = office.database_url
        self._capsys = capsys

    async def says(self, *arguments: str, status: int = 0) -> str:
        found = await asyncio.to_thread(main, [*arguments, "--url", self._url])
        said = self._capsys.readouterr()
        assert found == status, said.err
        return said.out if status == 0 else said.out + said.err

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self.says(*arguments, "--json"))


@pytest.fixture
def terminal(office: Office, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(office, capsys)


async def failed(office: Office) -> Job:
    async with working(office, [fail]):
        job = await office.enqueue(fail)
        await office.final(job)
    return job


async def test_jobs_are_listed_by_state_and_task_and_shown_with_their_attempts(
    office: Office, terminal: Terminal
) -> None:
    assert await terminal.says("jobs", "list") == "no such job\n"
    bad, waiting = await failed(office), await office.enqueue(a_task, [1], name="x")
    assert [job["id"] for job in await terminal.json("jobs", "list")] == [str(waiting.id), str(bad.id)]
    assert [job["id"] for job in await terminal.json("jobs", "list", "--state", "failed")] == [str(bad.id)]
    assert [job["id"] for job in await terminal.json("jobs", "list", "--task", "a_task")] == [str(waiting.id)]
    assert [job["id"] for job in await terminal.json("jobs", "list", "--before", str(waiting.id))] == [str(bad.id)]
    table = await terminal.says("jobs", "list")
    assert all(word in table for word in (str(bad.id), "fail", "failed", "ValueError: no stock", "queued"))
    shown = await terminal.json("jobs", "show", str(bad.id))
    assert (shown["state"], shown["attempts"][0]["outcome"]) == ("failed", "failed")
    assert "Traceback" in await terminal.says("jobs", "show", str(bad.id))
    assert (await terminal.json("jobs", "show", str(waiting.id)))["arguments"] == [[[1]], {"name": "x"}]


async def test_the_table_shows_no_error_of_a_job_that_is_done(office: Office, terminal: Terminal) -> None:
    """An attempt before it had one."""
    job = await failed(office)
    died = "the worker that ran it died"
    async with office.session_maker() as session:
        await session.execute(update(Job).values(error=died))
        await session.commit()
        assert "died" in await terminal.says("jobs", "list")
        await session.execute(update(Job).values(state="done"))
        await session.commit()
    assert "died" not in await terminal.says("jobs", "list")
    assert [each["error"] for each in await terminal.json("jobs", "list")] == [died]
    assert died in await terminal.says("jobs", "show", str(job.id))


async def test_jobs_are_retried_all_or_none_and_cancelled(office: Office, terminal: Terminal) -> None:
    bad, unknown = await failed(office), new_id()
    said = await terminal.says("jobs", "retry", str(bad.id), str(unknown), status=1)
    assert said == f"coord: Job({unknown}) not found\n"
    assert (await office.row(bad)).state is JobState.FAILED
    assert await terminal.says("jobs", "retry", str(bad.id)) == "1 to run again\n"
    assert (await office.row(bad)).state is JobState.QUEUED
    assert await terminal.says("jobs", "cancel", str(bad.id)) == f"{bad.id} cancelled\n"
    assert (await office.row(bad)).state is JobState.CANCELLED
    await terminal.says("jobs", "retry", str(bad.id))
    async with working(office, [fail]):
        await office.final(bad, within=15)
    assert await terminal.says("jobs", "cancel", str(bad.id), status=1) == f"{bad.id} is failed: too late\n"


async def test_jobs_that_ended_long_ago_are_pruned_and_no_others(
    office: Office, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, waiting = await failed(office), await office.enqueue(a_task), await office.enqueue(a_task)
    async with office.session_maker.begin() as session:
        await cancel_job(session, new.id)
        await session.execute(
            text("UPDATE coord_jobs SET finished_at = now() - interval '3 days' WHERE state = 'failed'")
        )
    assert await terminal.says("jobs", "prune", "--older-than", "4", "--yes") == "0 deleted\n"
    assert await terminal.says("jobs", "prune", "--older-than", "2", "--state", "done", "--yes") == "0 deleted\n"
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "n")
    await terminal.says("jobs", "prune", "--older-than", "2", status=130)
    assert await terminal.says("jobs", "prune", "--older-than", "2", "--yes") == "1 deleted\n"
    assert {job["id"] for job in await terminal.json("jobs", "list")} == {str(new.id), str(waiting.id)}
    async with office.session_maker() as session:
        left = await session.scalar(text("SELECT count(*) FROM coord_attempts WHERE job_id = :id"), {"id": old.id})
    assert left == 0


async def test_pruning_goes_in_batches_whatever_the_plan(
    office: Office,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coord.cli.jobs.PRUNED_ROWS", 2)
    async with office.session_maker.begin() as session:
        for _ in range(5):
            await cancel_job(session, (await enqueue(session, a_task)).id)
    methods = ("hashjoin", "mergejoin", "hashagg", "sort", "material", "memoize")
    settings = {f"enable_{method}": "off" for method in methods}
    loops = create_async_engine(office.database_url, connect_args={"server_settings": settings})
    async with loops.connect() as connection:
        batch = _ended(["cancelled"], 0.0)
        assert [(await connection.execute(batch)).rowcount for _ in range(4)] == [2, 2, 1, 0]
    await loops.dispose()


@pytest.mark.parametrize("days", ["1e10", "nan", "-1"])
async def test_an_age_that_no_time_has_is_an_error_in_one_line(terminal: Terminal, days: str) -> None:
    said = await terminal.says("jobs", "prune", "--older-than", days, "--yes", status=2)
    assert "Invalid value for '--older-than'" in said


async def test_queues_and_workers_are_listed(office: Office, terminal: Terminal) -> None:
    assert await terminal.says("workers") == "no worker has a heartbeat\n"
    assert await terminal.json("queues", "list") == []
    await office.enqueue(a_task)
    async with working(office, [fail]):
        (worker,) = await terminal.json("workers")
        assert (worker["queue"], worker["knows"], worker["runs"]) == ("default", "fail", 0)
        assert "fail" in await terminal.says("workers")
        (queue,) = await terminal.json("queues", "list")
    assert (queue["queue"], queue["paused since"]) == ("default", None)
    assert queue["due"] + queue["later"] == 1  # it is put off, since nobody knows its task
    assert (queue["oldest"] is not None) == (queue["due"] == 1)
    assert "default" in await terminal.says("queues", "list")


async def test_a_queue_is_paused_and_resumed(office: Office, terminal: Terminal) -> None:
    assert await terminal.says("queues", "pause", "default") == "default is paused\n"
    async with working(office, [a_task]):
        job = await office.enqueue(a_task)
        (queue,) = await terminal.json("queues", "list")
        assert (queue["due"], queue["paused since"] is not None) == (1, True)
        assert await terminal.says("queues", "resume", "default") == "default is resumed\n"
        assert (await office.final(job, within=10)).state == "done"


async def test_a_ledger_that_is_not_there_is_one_line(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = database_url.rsplit("/", 1)[0] + "/postgres"
    for arguments in (["jobs", "list"], ["workers"], ["queues", "list"], ["locks"]):
        assert await asyncio.to_thread(main, [*arguments, "--url", url]) == 1
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert "coord schema --apply" in said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "Usage: coord " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["jobs", "nonsense"], ["jobs", "show", "x"], ["dev"]], ids=" ".join
)
def test_a_command_line_that_makes_no_sense_is_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize("worker", ["worker:Settings", "Settings", "worker."])
@pytest.mark.parametrize("command", [["dev", "--app", "api:app"], ["doctor", "--url", "nonsense"]], ids=lambda c: c[0])
def test_worker_settings_that_are_no_dotted_name_are_refused_first(
    command: list[str], worker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--worker", worker]) == 2
    assert f"--worker is module.Class, as for arq, not {worker}" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"coord, version {importlib.metadata.version('coord')}\n"


async def test_tables_need_rich_and_json_does_not(
    office: Office, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.enqueue(a_task)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    said = await terminal.says("jobs", "list", status=1)
    assert said == 'coord: tables need rich: pip install "coord[cli]"; --json does without\n'
    assert len(await terminal.json("jobs", "list")) == 1
