"""The heartbeat: who is on the list of workers, from when, and until when."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from arq.worker import create_worker
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import set_progress, worker_settings
from coord.jobs.model import JobState
from coord.worker.maintenance import beat
from coord.worker.maintenance.beat import Board
from tests import workers
from tests.commands import started
from tests.ledger import a_task
from tests.proxy import Proxy
from tests.serving import eventually
from tests.workers import Working

if TYPE_CHECKING:
    from pathlib import Path

    from tests.workers import Office

ANSWERS = 50
working = partial(workers.working, heartbeat_process=True)


async def test_a_worker_stopped_at_any_step_of_its_start_is_not_on_the_list(office: Office) -> None:
    """Whether its row is not yet written, is, or is and the worker does not know."""
    for answer in range(1, ANSWERS):
        has_begun = await stopped_before(answer, office)
        assert await office.workers() == [], answer
        if has_begun:
            return
    raise AssertionError(f"it waits for more than {ANSWERS} answers")


async def stopped_before(answer: int, office: Office) -> bool:
    """A worker that is stopped while that answer of PostgreSQL is on its way; whether it has begun without."""
    async with Proxy(office.database_url).opened() as proxy:
        proxy.stops_at = answer
        engine = create_async_engine(proxy.url)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        settings: Any = worker_settings([a_task], session_maker=sessions, redis=office.redis_url, handle_signals=False)
        worker = Working(create_worker(settings))
        await eventually(lambda: not proxy.flows.is_set() or "coord.lifecycle" in worker.worker.ctx)
        has_begun = "coord.lifecycle" in worker.worker.ctx
        worker.task.cancel()
        await asyncio.sleep(0)
        proxy.stops_at = 0
        proxy.flows.set()
        await worker.stop()
        await engine.dispose()
    return has_begun


async def test_the_jobs_that_run_and_the_tasks_that_are_known_are_on_the_list(office: Office) -> None:
    go = asyncio.Event()

    async def held(ctx: dict[str, Any], name: str = "x") -> None:
        set_progress(ctx, {"done": 0.5})
        await go.wait()

    async with working(office, [held, a_task]):
        job = await office.enqueue(held)

        async def is_named() -> bool:
            (row,) = await office.workers()
            told = row.jobs.get(str(job.id), {})
            return bool(told.get("progress") == {"done": 0.5} and told["attempt"] == 1)

        await eventually(is_named)
        (row,) = await office.workers()
        assert {name.rpartition(".")[2] for name in row.tasks} == {"held", "a_task"}
        assert any("name: 'str' = 'x'" in signature for signature in row.tasks.values())
        go.set()
        await office.final(job)

        async def is_named_no_more() -> bool:
            (row,) = await office.workers()
            return not row.jobs

        await eventually(is_named_no_more)


@pytest.mark.parametrize("how", ["process", "thread"])
async def test_a_heart_beats_every_two_seconds_however_connections_are_made(
    office: Office, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be passed to another process is said, and a thread does it."""
    url = make_url(office.database_url)

    async def connect() -> Any:
        return await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))

    options = {"async_creator": connect} if how == "thread" else {}
    async with working(office, [a_task], engine=options):

        async def has_beaten() -> bool:
            (row,) = await office.workers()
            return bool(row.beats >= 3)

        await eventually(has_beaten, within=10)
    assert await office.workers() == []
    assert ("The heartbeat is a thread" in caplog.text) is (how == "thread")


async def test_a_heartbeat_that_was_killed_is_started_again(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    async with working(office, [a_task]) as worker:
        heartbeat = worker.worker.ctx["coord.lifecycle"].heartbeat
        await eventually(lambda: heartbeat._process is not None)
        first = heartbeat._process
        first.kill()
        await eventually(lambda: heartbeat._process is not first, within=10)

        async def beats() -> bool:
            (row,) = await office.workers()
            return bool(row.beats >= 2)

        await eventually(beats, within=10)
    assert "is started again" in caplog.text


async def test_a_heartbeats_process_that_does_not_end_is_killed_and_waited_for(office: Office) -> None:
    """Who would leave it to the event loop may close that too early, and nobody learns of its end."""
    async with working(office, [a_task]) as worker:
        heartbeat = worker.worker.ctx["coord.lifecycle"].heartbeat
        await eventually(lambda: heartbeat._process is not None)
        heartbeat._process.send_signal(signal.SIGSTOP)
    assert heartbeat._process.returncode == -signal.SIGKILL
    assert not heartbeat._beating.cancelled()


async def test_a_worker_that_stops_at_once_does_not_wait_for_what_its_heartbeat_imports(tmp_path: Path) -> None:
    (tmp_path / "sqlalchemy.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(3600)\n")
    board, pipe = Board(1), asyncio.subprocess.PIPE
    command = (sys.executable, "-I", beat.__file__, str(board.file))
    async with started(*command, stdin=pipe, stdout=pipe, pass_fds=[board.file]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told = {"path": [str(tmp_path), *sys.path], "slots": 1, "pid": os.getpid()}
        process.stdin.write(json.dumps(told).encode() + b"\n")
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"begun\n"
        await process.communicate(b'{"end": true}\n')
        assert process.returncode == 0
    board.close()


async def test_a_heartbeat_that_cannot_be_started_is_tried_again(
    office: Office, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged, and the worker goes on."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nonexistent/python")
        async with working(office, [a_task]) as worker:
            await eventually(lambda: "heartbeat's process has failed, and is started again" in caplog.text)
            patched.undo()

            async def beats() -> bool:
                (row,) = await office.workers()
                return bool(row.beats >= 2)

            await eventually(beats, within=15)
            assert (await office.final(await office.enqueue(a_task))).state is JobState.DONE
            assert worker.lives


async def test_who_was_taken_for_dead_and_lives_is_on_the_list_again(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(office, [a_task]):
        async with office.session_maker.begin() as session:
            await session.execute(text("DELETE FROM coord_workers"))

        async def is_back() -> bool:
            return len(await office.workers()) == 1

        await eventually(is_back, within=10)
        (row,) = await office.workers()
        assert row.tasks
        await eventually(lambda: "was taken for dead" in caplog.text)
        assert (await office.final(await office.enqueue(a_task))).state is JobState.DONE
