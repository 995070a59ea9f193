"""Where the time of a job, and of a wait for it, went: measured as it passes, carried with the bell, and never data."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from sqlalchemy.orm import Session

from coord.database.engine import AnySession

ATTEMPT_TIMINGS, WAIT_TIMINGS = "coord.attempt_timings", "coord.wait_timings"
"""Where they are in a session's `info`: of the attempt whose transaction it is, and of its last wait."""
MAX_SUBJECT_CHARACTERS = 200
MAX_BYTES = 1_000
"""Of what comes with the bell."""
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_NOT_IN_A_HEADER = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")


@dataclass(slots=True)
class AttemptTimings:
    """Of one attempt at a job, in seconds, by its worker's clock but for the queue's, which is Redis'."""

    job_id: str
    number: int
    """Of the attempt."""
    queue: float
    """From when it was due, or its `enqueue`, until the attempt began."""
    lock: float = 0.0
    """Waiting for `lock_tables` and `advisory_lock`."""
    locked: str = ""
    """What it waited for longest: `orders, stock in SHARE ROW EXCLUSIVE mode`."""
    task: float = 0.0
    """The rest of the attempt, until its commit."""
    began: float = field(default_factory=monotonic, repr=False)
    _longest: float = field(default=-1.0, repr=False)

    def add_lock(self, subject: str, seconds: float) -> None:
        self.lock += seconds
        if seconds > self._longest:
            self._longest, self.locked = seconds, subject[:MAX_SUBJECT_CHARACTERS]

    def stop(self) -> None:
        """Its effect, or its end, is committed now."""
        self.task = max(0.0, monotonic() - self.began - self.lock)

    def payload(self) -> bytes:
        seconds = (round(each, 4) for each in (self.queue, self.lock, self.task))
        told = [self.job_id, self.number, *seconds, self.locked]
        return _ENCODER.encode(told).encode()

    @classmethod
    def read(cls, payload: bytes) -> AttemptTimings | None:
        """None of what is no such thing: anybody may publish anything."""
        try:
            job_id, number, queue, lock, task, locked = json.loads(payload[:MAX_BYTES])
            made = cls(job_id, number, float(queue), float(lock), locked, float(task))
        except (TypeError, ValueError, OverflowError, RecursionError):
            return None
        sound = isinstance(job_id, str) and type(number) is int and isinstance(locked, str)
        return made if sound and all(0 <= each < math.inf for each in (made.queue, made.lock, made.task)) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitTimings:
    """Where the time of an answered wait went, in seconds; None is what nobody has told this process."""

    total: float
    """Since the commit of its job, or since it was due, if this process made it; else since the wait began."""
    queue: float | None = None
    """From that commit, or from when the job was due, until the attempt that ended the wait began."""
    lock: float | None = None
    locked: str = ""
    """The tables and the mode that it waited for longest."""
    task: float | None = None
    """The rest of the attempt, until its commit."""
    wake: float | None = None
    """From that commit to this answer; where the job's own commit is unknown, from the bell's arrival."""
    retries: float | None = None
    """Attempts before the one that ended the wait, and the pauses between them."""
    job_id: str | None = None

    def parts(self) -> dict[str, float]:
        """Those that are known."""
        found = {name: getattr(self, name) for name in ("queue", "lock", "task", "wake", "retries")}
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header (W3C Server Timing, section 3), in milliseconds."""
        about = {"lock": f';desc="{_NOT_IN_A_HEADER.sub("?", self.locked)}"' if self.locked else ""}
        parts = {**self.parts(), "total": self.total}
        return ", ".join(f"{name};dur={seconds * 1000:.1f}{about.get(name, '')}" for name, seconds in parts.items())


def wait_timings_of(job: Any, told: tuple[bytes, float] | None, *, began: float) -> WaitTimings:
    """What is known at a wait's end; `told` is the bell's payload and when it came, on the monotonic clock."""
    now = monotonic()
    due = getattr(job, "due_said_at", 0.0) + getattr(job, "due_in", 0.0)
    committed: float = getattr(job, "committed_at", 0.0)
    total = now - (max(committed, due if due < now else 0.0) if committed else began)
    spent = None if told is None else AttemptTimings.read(told[0])
    if spent is None or told is None:
        return WaitTimings(total=total)
    first = bool(committed) and spent.number == 1
    # The queue's time counts from the INSERT, this wait's from the commit.
    queue = max(0.0, spent.queue - max(0.0, committed - due)) if first else spent.queue
    rest = max(0.0, total - queue - spent.lock - spent.task)
    wake = rest if first else now - told[1]
    return WaitTimings(
        total=total,
        queue=queue,
        lock=spent.lock,
        locked=spent.locked,
        task=spent.task,
        wake=wake,
        retries=max(0.0, rest - wake) if committed and not first else None,
        job_id=spent.job_id,
    )


def attempt_payload(session: Session) -> bytes:
    """For the bell: the timings of the attempt whose commit this is, or nothing."""
    timings: AttemptTimings | None = session.info.get(ATTEMPT_TIMINGS)
    if timings is None:
        return b""
    timings.stop()
    return timings.payload()


def wait_timings(session: AnySession) -> WaitTimings | None:
    """Where the time of the session's last wait went; None before its first one has ended."""
    found: Any = session.info.get(WAIT_TIMINGS)
    return found if isinstance(found, WaitTimings) else None
