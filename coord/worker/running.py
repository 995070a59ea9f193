"""The jobs that one worker runs, and how many more it may."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from coord.jobs.attempt import Attempt
from coord.queue.message import Message
from coord.worker.maintenance.beat import Board


@dataclass(slots=True, eq=False)
class RunningJob:
    """From before its first step until its end is written."""

    message: Message
    attempt: Attempt
    slot: int
    task: asyncio.Task[Any] | None = None
    may_cancel: bool = True
    """Not any more while the end is written."""
    unwanted: bool = False
    """Whether somebody has cancelled the job."""
    stopping: bool = False
    """Whether it is cancelled since its worker stops."""
    abandoned: bool = False
    """Whether its worker has stopped without it: its end is no longer its own to write."""

    def cancel(self) -> bool:
        """Whether it still can be."""
        return self.may_cancel and self.task is not None and self.task.cancel()


class RunningJobs:
    """What is in here is on the heartbeat's board as well."""

    def __init__(self, board: Board, tasks: Iterable[str]) -> None:
        self._board = board
        self._numbers = {name: number for number, name in enumerate(tasks)}
        """The places of the tasks in the list that the heartbeat has."""
        self._by_id: dict[UUID, RunningJob] = {}
        self.changed = asyncio.Event()
        """Set when one has ended, the queue goes on, or the worker is to stop: cleared by the one who waits for it."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RunningJob]:
        return iter([*self._by_id.values()])

    @property
    def free(self) -> int:
        """How many more may run."""
        return self._board.free

    @property
    def has_suspect(self) -> bool:
        """Whether one of them is a job that has been aboard a worker that died."""
        return any(running.message.deaths for running in self._by_id.values())

    def get(self, job_id: UUID) -> RunningJob | None:
        return self._by_id.get(job_id)

    def add(self, message: Message, attempt: Attempt) -> RunningJob:
        slot = self._board.add(message.id, message.attempt, self._numbers.get(message.task, -1))
        running = self._by_id[message.id] = RunningJob(message, attempt, slot)
        return running

    def remove(self, running: RunningJob) -> None:
        if self._by_id.get(running.message.id) is running:
            del self._by_id[running.message.id]
            self._board.remove(running.slot)
            self.changed.set()

    def stop(self) -> None:
        """The worker has no more time for them."""
        for running in self:
            running.stopping = running.cancel()

    async def abandon(self, limit: float) -> None:
        """Their ends could not be written in time; others find out."""
        tasks = [running.task for running in self if running.task is not None]
        for running in self:
            running.abandoned = True
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=limit)

    def cancel(self, job_id: UUID, attempt: int) -> None:
        """Somebody wants the job cancelled, or has begun another attempt."""
        running = self._by_id.get(job_id)
        if running is not None and running.message.attempt == attempt and not running.unwanted:
            running.unwanted = running.cancel()
