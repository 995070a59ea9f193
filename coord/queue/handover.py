"""Handing jobs over: what is sent to Redis once the transaction that made, changed or ended them has committed."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import Any

from sqlalchemy import Row

from coord.jobs.model import Job
from coord.notify.client import Command, Commands
from coord.queue.keys import QueueKeys, rank, soon_member
from coord.queue.message import Message
from coord.queue.scripts import NEAR_SECONDS, PUSH

MAX_JOBS_PER_COMMAND = 100


def push(keys: QueueKeys, jobs: Iterable[tuple[Job | Row[Any], float]]) -> Command | None:
    """One command that hands jobs over, each with the seconds that remain until it is due; None for none.

    What is due later than in a minute is left to the scheduler, which reads the ledger.
    """
    parts: list[str | int] = []
    for job, seconds in jobs:
        if seconds <= NEAR_SECONDS:
            parts += [round(seconds * 1000), rank(job.priority), Message.of(job).text()]
    return ("EVAL", PUSH, 2, keys.feed, keys.soon, *parts) if parts else None


def hand_over(jobs: Iterable[Job], namespace: str) -> dict[Hashable, Commands]:
    """What gives new jobs, or new attempts of old ones, to the workers of their queues, and takes back what has ended.

    By what each is about: one job, or all of many, of which one may be withdrawn while they are still to be sent.
    """
    commands: dict[Hashable, Commands] = {}
    queues: dict[str, list[tuple[Job, float]]] = {}
    for job in jobs:
        if job.state.is_final:
            keys, text = QueueKeys(namespace, job.queue), Message.of(job).text()
            commands[job.id] = [("ZREM", keys.feed, text), ("ZREM", keys.soon, soon_member(text, job.priority))]
        else:
            remaining = job.due_in - (time.monotonic() - job.due_said_at) if job.due_said_at else job.due_in
            queues.setdefault(job.queue, []).append((job, remaining))
    for queue, waiting in queues.items():
        for start in range(0, len(waiting), MAX_JOBS_PER_COMMAND):
            some = waiting[start : start + MAX_JOBS_PER_COMMAND]
            command = push(QueueKeys(namespace, queue), some)
            if command is not None:
                ids = tuple(job.id for job, _ in some)
                commands[ids if len(ids) > 1 else ids[0]] = (command,)
    return commands
