"""The jobs that a worker runs: who is told to stop, and who is not."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from coord.jobs.model import new_id
from coord.queue.message import Message
from coord.worker.maintenance.beat import Board
from coord.worker.running import RunningJobs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def running() -> Iterator[RunningJobs]:
    with contextlib.closing(Board(2)) as board:
        yield RunningJobs(board, ["a_task"])


@pytest.mark.parametrize(("meant", "cancelled"), [(1, False), (2, True)])
async def test_a_cancellation_meant_for_another_attempt_leaves_the_one_that_runs(
    running: RunningJobs, meant: int, cancelled: bool
) -> None:
    """The next attempt may have begun while the last one was looked up."""
    attempt: Any = None
    job = running.add(Message(new_id(), 2, "a_task", [], {}), attempt)
    job.task = asyncio.create_task(asyncio.Event().wait())
    running.cancel(job.message.id, meant)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (job.unwanted, job.task.cancelled()) == (cancelled, cancelled)
    job.task.cancel()
    running.remove(job)
