"""What to run, and how, for `enqueue`: beside the task's own arguments and never among them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Concatenate, Generic, ParamSpec, overload

from arq.worker import Function

from coord.durations import Seconds, positive, seconds, whole

P = ParamSpec("P")

Task = Callable[Concatenate[Any, P], Awaitable[Any]]

DEFAULT_QUEUE = "default"

MAX_NAME_BYTES, MAX_UNIQUE_KEY_BYTES = 500, 2_000
"""Bytes of a task's or queue's name, and of a key; PostgreSQL refuses an index entry of a third of a page."""
MAX_ATTEMPTS = 1_000_000
MAX_PRIORITY = 100
MAX_SPAN_SECONDS = 100 * 365 * 86_400
"""Within it clocks, calendars and Redis agree."""


@dataclass(frozen=True, slots=True)
class TaskOptions(Generic[P]):
    """A task and how to run it, checked; made by `task_options`."""

    task: Task[P] | Function | str
    unique_key: str | None = None
    delay: float | datetime | None = None
    queue: str | None = None
    max_attempts: int | None = None
    priority: int = 0
    timeout: float | None = None
    one_at_a_time: str | None = None

    @property
    def name(self) -> str:
        """The name under which arq's workers know the task: what it is called in its module."""
        return name_of(self.task)


@overload
def task_options(
    task: str | Function,
    *,
    unique_key: str | None = None,
    delay: Seconds | datetime | None = None,
    queue: str | None = None,
    max_attempts: int | None = None,
    timeout: Seconds | None = None,
    priority: int = 0,
    one_at_a_time: str | None = None,
) -> TaskOptions[...]: ...
@overload
def task_options(
    task: Task[P],
    *,
    unique_key: str | None = None,
    delay: Seconds | datetime | None = None,
    queue: str | None = None,
    max_attempts: int | None = None,
    timeout: Seconds | None = None,
    priority: int = 0,
    one_at_a_time: str | None = None,
) -> TaskOptions[P]: ...
def task_options(
    task: Any,
    *,
    unique_key: str | None = None,
    delay: Seconds | datetime | None = None,
    queue: str | None = None,
    max_attempts: int | None = None,
    timeout: Seconds | None = None,
    priority: int = 0,
    one_at_a_time: str | None = None,
) -> TaskOptions[Any]:
    """`task` for `enqueue`, with options.

    `unique_key`: while a job of this task with this key is unfinished, enqueueing gives that job. `delay`: seconds from
    now, or an aware time, before which it does not start. `queue`: another than the default one. `max_attempts`: how
    many at most, the first included. `timeout`: seconds an attempt may take. `priority`: -100 to 100; of
    the jobs that are due, those of a higher one are taken first. `one_at_a_time`: a key; of the jobs that have it one
    runs at a time, over all tasks, queues and workers, and the others wait in the ledger.

        job = await enqueue(session, task_options(fulfil_order, unique_key=f"order {order_id}"), order_id)

    Raises `ValueError` or `TypeError` here, at once, for what makes no sense.
    """
    name_of(task)
    return TaskOptions(
        task,
        None if unique_key is None else checked_text("unique_key", unique_key, MAX_UNIQUE_KEY_BYTES),
        None if delay is None else _delay(delay),
        None if queue is None else checked_text("queue", queue),
        None if max_attempts is None else whole("max_attempts", max_attempts, most=MAX_ATTEMPTS),
        whole("priority", priority, least=-MAX_PRIORITY, most=MAX_PRIORITY),
        None if timeout is None else span("timeout", positive("timeout", timeout)),
        None if one_at_a_time is None else checked_text("one_at_a_time", one_at_a_time, MAX_UNIQUE_KEY_BYTES),
    )


def name_of(task: object) -> str:
    name = task.name if isinstance(task, Function) else task
    if callable(task) and not isinstance(task, type | Function):
        name = getattr(task, "__qualname__", None)
    if not isinstance(name, str) or name.endswith("<lambda>"):
        raise TypeError(f"task is a function with a name, what arq's func makes of one, or a task's name; not {task!r}")
    return checked_text("task", name)


def checked_text(what: str, value: object, longest: int = MAX_NAME_BYTES) -> str:
    """`value` if PostgreSQL and Redis can keep it."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a text, not {value!r}")
    encoded = value.encode(errors="replace")
    if not 0 < len(encoded) <= longest or "\0" in value or encoded.decode() != value:  # half a surrogate pair
        raise ValueError(f"{what} is a text of 1 to {longest} bytes, without null characters, not {value!r}")
    return value


def _delay(delay: Seconds | datetime) -> float | datetime:
    if not isinstance(delay, datetime):
        return span("delay", delay)
    if delay.utcoffset() is None:
        raise ValueError(f"delay is an aware datetime, and {delay!r} has no time zone")
    if (delay - datetime.now(UTC)).total_seconds() > MAX_SPAN_SECONDS:
        raise ValueError(f"delay is at most a hundred years, not until {delay}")
    return delay


def span(what: str, value: object) -> float:
    """Seconds that a time may be away from now; `ValueError` for more than a hundred years."""
    number = seconds(what, value)
    if number > MAX_SPAN_SECONDS:
        raise ValueError(f"{what} is at most a hundred years, not {value!r}")
    return number
