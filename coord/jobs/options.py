"""What to run, and how, for `enqueue`: beside the task's own arguments and never among them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Concatenate, Generic, ParamSpec

from arq.worker import Function

from coord.durations import Seconds, seconds

P = ParamSpec("P")

Task = Callable[Concatenate[Any, P], Awaitable[Any]]

LONGEST_KEY = 500
"""Characters of a unique key; PostgreSQL refuses an index entry of a third of a page."""


@dataclass(frozen=True, slots=True)
class TaskOptions(Generic[P]):
    """A task and how to run it, checked; made by `task_options`."""

    task: Task[P] | Function | str
    unique_key: str | None = None
    delay: float | datetime | None = None
    queue: str | None = None
    attempts: int | None = None
    timeout: float | None = None

    @property
    def name(self) -> str:
        """The name under which arq's workers know the task: what it is called in its module."""
        match self.task:
            case str():
                return self.task
            case Function():
                return self.task.name
        return self.task.__qualname__


def task_options(
    task: Task[P],
    *,
    unique_key: str | None = None,
    delay: Seconds | datetime | None = None,
    queue: str | None = None,
    attempts: int | None = None,
    timeout: Seconds | None = None,
) -> TaskOptions[P]:
    """`task` for `enqueue`, with options.

    `unique_key`: while a job of this task with this key is unfinished, enqueueing gives that job. `delay`: seconds from
    now, or an aware time, before which it does not start. `queue`: another than the default one. `attempts`: how many
    at most, the first included. `timeout`: seconds an attempt may take.

        job = await enqueue(session, task_options(fulfil_order, unique_key=f"order {order_id}"), order_id)

    Raises `ValueError` or `TypeError` here, at once, for what makes no sense.
    """
    if unique_key is not None and (not isinstance(unique_key, str) or not 0 < len(unique_key) <= LONGEST_KEY):
        raise ValueError(f"unique_key is a text of 1 to {LONGEST_KEY} characters, not {unique_key!r}")
    if unique_key is not None and "\0" in unique_key:
        raise ValueError("unique_key has a null character, which PostgreSQL's text cannot hold")
    if queue is not None and (not isinstance(queue, str) or not queue):
        raise ValueError(f"queue is a queue's name, not {queue!r}")
    if attempts is not None and (not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1):
        raise ValueError(f"attempts is a whole number, 1 or more, not {attempts!r}")
    limit = None if timeout is None else seconds("timeout", timeout)
    if limit == 0:
        raise ValueError("timeout is more than 0 seconds")
    return TaskOptions(task, unique_key, _delay(delay), queue, attempts, limit)


def _delay(delay: Seconds | datetime | None) -> float | datetime | None:
    if isinstance(delay, datetime):
        if delay.tzinfo is None:
            raise ValueError(f"delay is an aware datetime, and {delay!r} says no time zone")
        return delay
    return None if delay is None else seconds("delay", delay)
