"""Schedules: which slots a periodic task has, by cron's rules and a time zone's."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Any, overload
from zoneinfo import ZoneInfo

from arq.worker import Function
from cronsim import CronSim, CronSimError

from coord.jobs.bulk import Call
from coord.jobs.bulk import call as call_of
from coord.jobs.options import P, Task, TaskOptions

ON_TIME_SECONDS = 300.0
"""After a slot in which its job is made anyway: a deploy, a restart or a blocked worker takes that long."""
MAX_NAME = 400
"""Characters of a schedule's name."""


@dataclass(frozen=True, slots=True)
class Periodic:
    """A schedule, checked; made by `periodic`."""

    call: Call
    cron: str
    timezone: str
    overlap: bool
    catch_up: int
    """How many of the slots that were missed are run, the last ones."""

    def name(self, queue: str) -> str:
        """What it is in the ledger: another cron line, or other arguments, make another schedule."""
        name = f"{queue}: {self.call.options.name}{self.call.text} {self.cron} {self.timezone}"
        return name if len(name) <= MAX_NAME else name[:MAX_NAME] + hashlib.sha256(name.encode()).hexdigest()

    def due(self, after: datetime, now: datetime) -> list[datetime]:
        """Of the slots after one time and up to another, those that a job is to be made for."""
        span = timedelta(seconds=ON_TIME_SECONDS)
        while True:
            since = max(after, now - span)
            passed = takewhile(lambda slot: slot <= now, self._slots(since))
            found = deque(passed, maxlen=self.catch_up or 1)
            if since == after or len(found) >= self.catch_up:
                return [*found]
            span *= 2  # only the last are wanted, and of a schedule of every second a month has millions

    def next(self, after: datetime) -> datetime | None:
        return next(self._slots(after), None)

    def _slots(self, after: datetime) -> Iterator[datetime]:
        """Later than `after`, in UTC. Where clocks change as in Debian's cron, but no time comes twice."""
        for slot in CronSim(self.cron, after.astimezone(ZoneInfo(self.timezone))):
            if (moment := slot.astimezone(UTC)) > after:
                after = moment
                yield moment


@overload
def periodic(
    task: str | Function,
    cron: str,
    /,
    *args: Any,
    timezone: str = "UTC",
    overlap: bool = False,
    catch_up: int = False,
    **kwargs: Any,
) -> Periodic: ...
@overload
def periodic(
    task: Task[P] | TaskOptions[P],
    cron: str,
    /,
    *args: Any,
    timezone: str = "UTC",
    overlap: bool = False,
    catch_up: int = False,
    **kwargs: Any,
) -> Periodic: ...
def periodic(
    task: Any,
    cron: str,
    /,
    *args: Any,
    timezone: str = "UTC",
    overlap: bool = False,
    catch_up: int = False,
    **kwargs: Any,
) -> Periodic:
    """A schedule for `worker_settings(periodic=[…])`: one job for each slot of the cron line, however many workers.

    `cron` has five fields, or six with the second first; its times are the time zone's. Of an hour that comes twice, a
    line that names its hour runs in the first; what lies in an hour that is left out runs right after it. With `*` for
    the hour, or `*…` for the minute, it goes by elapsed time. A slot is skipped while the job of an earlier one is
    unfinished, unless `overlap`. One that no worker made a job for within five minutes is left out, unless `catch_up`:
    True runs the last that was missed, a number (with `overlap`) so many of the last.

        Settings = worker_settings(
            [close_books], periodic=[periodic(close_books, "30 2 * * *", timezone="Europe/Berlin")], ...
        )

    `ctx["enqueue_time"]` is the slot. `ValueError` or `TypeError` here, at once, for what makes no sense.
    """
    try:
        ZoneInfo(timezone)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"not a time zone that is known here: {timezone!r}") from error
    call = call_of(task, *args, **kwargs)
    if call.options.unique_key is not None or call.options.delay is not None:
        raise ValueError("a periodic task has no unique_key and no delay: overlap=False keeps its jobs apart")
    if not isinstance(catch_up, int) or catch_up < 0 or (catch_up > 1 and not overlap):
        raise ValueError(f"catch_up is True, or with overlap=True a number of missed slots, not {catch_up!r}")
    made = Periodic(call, " ".join(cron.split()), timezone, bool(overlap), int(catch_up))
    try:
        if made.next(datetime.now(UTC)) is None:
            raise ValueError(f"the cron line {cron!r} has no time")
    except CronSimError as error:
        raise ValueError(f"not a cron line: {cron!r}: {error}") from error
    return made
