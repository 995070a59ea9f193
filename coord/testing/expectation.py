"""Whether a job is queued, and if not, what is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from arq.worker import Function
from sqlalchemy import func, select

from coord.database.engine import session_of
from coord.durations import seconds
from coord.jobs.arguments import as_it_arrives, check_call, is_same, signature_of, to_json
from coord.jobs.model import execute, is_queued, jobs
from coord.jobs.options import TaskOptions
from coord.testing.attempts import job_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coord.database.engine import AnySession
    from coord.durations import Seconds
    from coord.jobs.model import Job
    from coord.jobs.options import Task

    Moment = Seconds | datetime | None
    Shown = Mapping[str, str]
    """What a message shows of a job, by column."""

OPTIONS = ("queue", "priority", "unique_key", "one_at_a_time", "max_attempts", "timeout")
"""Of a job, as `task_options` gives them; those that are not given match any."""
COLUMNS = ("task", "arguments", *OPTIONS, "due")
MAX_ROWS, MAX_CHARACTERS = 20, 50
"""Rows, and characters of a cell, that are shown."""
_now = func.statement_timestamp()
_queued = select(*jobs.c, func.extract("epoch", jobs.c.scheduled_at - _now).label("due_in"), _now.label("now")).where(
    is_queued
)


async def assert_enqueued(
    session: AnySession,
    task: Task[...] | TaskOptions[...] | Function | str,
    /,
    *args: Any,
    scheduled: tuple[Moment, Moment] | None = None,
    **kwargs: Any,
) -> Job:
    """A queued job of the task, as the session sees it; `AssertionError` with what is queued if there is none.

    Matched as far as given: arguments by the task's parameters, however they were passed (of a task that is given by
    its name, as `enqueue` was given them); of `task_options(task, …)` what is not the default, `delay` as `enqueue` was
    given it. `scheduled` is from when to when the job is due, each in seconds from now or as an aware time, or None.

        await assert_enqueued(coord_session, task_options(send_invoice, queue="mail"), order.id, scheduled=(3500, 3700))

    Of several the first by age. Raises `TypeError` if the task has no such parameters, or JSON would change them.
    """
    __tracebackhide__ = True
    asked = _Asked.of(task, args, kwargs, scheduled)
    rows = await _read(session)
    for row in rows:
        if asked.matches(row):
            return job_of(row)
    others = sorted(rows, key=lambda row: row.task != asked.task)
    raise AssertionError(f"No such job is queued:\n\n{_table([asked.shown()])}\n\n{_queue(others)}")


async def refute_enqueued(
    session: AnySession,
    task: Task[...] | TaskOptions[...] | Function | str,
    /,
    *args: Any,
    scheduled: tuple[Moment, Moment] | None = None,
    **kwargs: Any,
) -> None:
    """`AssertionError` if a job is queued that `assert_enqueued` would find."""
    __tracebackhide__ = True
    asked = _Asked.of(task, args, kwargs, scheduled)
    found = [row for row in await _read(session) if asked.matches(row)]
    if found:
        raise AssertionError(f"Such a job is queued:\n\n{_table([asked.shown()])}\n\n{_queue(found)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    options: TaskOptions[Any]
    signature: inspect.Signature | None
    """None of a task that is known by its name only."""
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    scheduled: tuple[Moment, Moment] | None

    @classmethod
    def of(cls, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any], scheduled: Any) -> Self:
        options = task if isinstance(task, TaskOptions) else TaskOptions(task)
        as_it_arrives(f"{options.name}: the arguments", [[*args], kwargs])
        check_call(options.name, options.task, args, kwargs, partial=True)
        return cls(
            options=options,
            signature=signature_of(options.task),
            args=args,
            kwargs=kwargs,
            scheduled=_window(scheduled, options),
        )

    @property
    def task(self) -> str:
        return self.options.name

    def matches(self, row: Any) -> bool:
        return bool(
            row.task == self.task
            and all(getattr(row, name) == value for name, value in self._given().items())
            and self._is_scheduled(row)
            and self._has_arguments(*row.arguments)
        )

    def _given(self) -> dict[str, Any]:
        default: TaskOptions[...] = TaskOptions("")
        values = {name: getattr(self.options, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    def _is_scheduled(self, row: Any) -> bool:
        match self.options.delay:
            case datetime() as moment if row.scheduled_at != max(moment, row.created_at):
                return False
            case float() | int() as delay if row.scheduled_at - row.created_at != timedelta(seconds=delay):
                return False
        first, last = ((moment, row.now) for moment in self.scheduled or (None, None))
        due: datetime = row.scheduled_at
        return _moment(*first, due) <= due <= _moment(*last, due)

    def _has_arguments(self, args: list[Any], kwargs: dict[str, Any]) -> bool:
        if self.signature is None:
            return _includes([*self.args], args) and _includes(self.kwargs, kwargs)
        asked = self.signature.bind_partial(None, *self.args, **self.kwargs).arguments
        try:
            there = self.signature.bind(None, *args, **kwargs)
        except TypeError:
            return False
        there.apply_defaults()
        return all(
            _includes(value, there.arguments[name])
            if self.signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            else is_same(value, there.arguments[name])
            for name, value in asked.items()  # of the context, None, there too
        )

    def shown(self) -> Shown:
        given = {name: str(value) for name, value in self._given().items()}
        arguments = _arguments(self.args, self.kwargs) or "any"
        return {"task": self.task, "arguments": arguments, **given, "due": _due_asked(self.scheduled, self.options)}


def _includes(asked: Any, there: Any) -> bool:
    """The first of a list, or a part of a dictionary."""
    if isinstance(asked, list | tuple):
        return is_same([*asked], [*there][: len(asked)])
    return is_same(dict(asked), {name: value for name, value in there.items() if name in asked})


def _window(given: Any, options: TaskOptions[Any]) -> tuple[Moment, Moment] | None:
    if given is None:
        return None
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"scheduled is from when to when, (3500, 3700) say, not {given!r}")
    for moment in given:
        if isinstance(moment, datetime):
            if moment.utcoffset() is None:
                raise ValueError(f"scheduled is of aware datetimes, and {moment!r} has no time zone")
        elif moment is not None:
            seconds("scheduled", moment)
    if options.delay is not None:
        raise ValueError("assert_enqueued takes delay, as enqueue was given it, or scheduled=, and not both")
    return given


def _moment(given: Moment, now: datetime, otherwise: datetime) -> datetime:
    if given is None:
        return otherwise
    return given if isinstance(given, datetime) else now + timedelta(seconds=seconds("scheduled", given))


async def _read(session: AnySession) -> Sequence[Any]:
    return (await session_of(session).run_sync(execute, _queued.order_by(jobs.c.id))).all()


def _queue(rows: Sequence[Any]) -> str:
    if not rows:
        return "Nothing is queued."
    what = "1 job is queued" if len(rows) == 1 else f"{len(rows)} jobs are queued"
    return f"{what}:\n\n{_table([_of_row(row) for row in rows])}"


def _of_row(row: Any) -> Shown:
    default = {"priority": 0}
    options = {name: value for name in OPTIONS if (value := getattr(row, name)) != default.get(name)}
    due = "now" if row.due_in <= 0 else f"in {row.due_in:,.0f} s"
    return {
        "task": row.task,
        "arguments": _arguments(*row.arguments) or "none",
        **{name: str(value) for name, value in options.items()},
        "due": due,
    }


def _due_asked(scheduled: tuple[Moment, Moment] | None, options: TaskOptions[Any]) -> str:
    if options.delay is not None:
        delay = options.delay
        return f"{delay:%Y-%m-%d %H:%M:%S %Z}" if isinstance(delay, datetime) else f"{delay:,g} s after enqueue"
    if scheduled is None:
        return ""
    first, last = (_bound(moment) for moment in scheduled)
    return " ".join(part for part in (first and f"from {first}", last and f"until {last}") if part)


def _bound(moment: Moment) -> str:
    if moment is None:
        return ""
    return (
        f"{moment:%Y-%m-%d %H:%M:%S %Z}" if isinstance(moment, datetime) else f"in {seconds('scheduled', moment):,g} s"
    )


def _table(rows: Sequence[Shown]) -> str:
    """A line of names and a line a row, without the columns that none has anything in."""
    names = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    cells = [names, *([_cut(row.get(name, "")) for name in names] for row in rows[:MAX_ROWS])]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["    " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    if len(rows) > MAX_ROWS:
        lines.append(f"    … and {len(rows) - MAX_ROWS} more")
    return "\n".join(lines)


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """As they are passed, each as JSON."""
    named = (f"{name}={to_json(value)}" for name, value in kwargs.items())
    return ", ".join([*map(to_json, args), *named])


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 1]}…"
