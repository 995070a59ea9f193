"""One wait: what it has seen of its row, its deadline, and the job that may end it."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any, Generic, Self

from coord.database.target import M, Target
from coord.errors import WaitTimeoutError
from coord.waiting.baseline import Baseline
from coord.waiting.poller import Poller

NEAR_SECONDS = 2.0
"""Before an alarm, when it has a timer: to have one all the time would make a wait larger by half a KiB."""
LAST_READ_SECONDS = 0.8
"""How long after its deadline a wait may still learn of a change that was there at the deadline."""


class Waiter(Generic[M]):
    """A wait, registered with the poller of one mapped class until its block ends."""

    counts = 1
    """How many of the process's `max_waiters` it takes."""
    __slots__ = (
        *("_alarm", "_alarm_at", "_poller", "_signal", "awaits_message", "baseline", "began", "concluding", "error"),
        *("has_read", "interval", "job", "last", "over", "target", "then"),
    )

    def __init__(
        self, poller: Poller, target: Target[M], baseline: Baseline, *, interval: float, awaits_message: bool = False
    ) -> None:
        self._poller = poller
        self._signal: asyncio.Future[None] | None = None
        self._alarm_at: float | None = None
        """When `on_deadline` is to be called, on the loop's clock."""
        self._alarm: asyncio.TimerHandle | None = None
        """Its timer, once that is near."""
        self.target = target
        self.began = monotonic()
        self.baseline = baseline
        self.interval = interval
        self.awaits_message = awaits_message
        """Whether the row cannot have changed without a message."""
        self.concluding = False
        """Whether the next row is the last, whatever it is."""
        self.has_read = False
        self.job: Waiter[Any] | None = None
        """The waiter for the job that may end this wait."""
        self.then: tuple[int, Waiter[Any]] | None = None
        """The waiter whose row is read after the read with this number, unless that ends the wait."""
        self.last = False
        """Whether the deadline has passed and the next read is the last."""
        self.over = False
        """Whether that read is done, or has taken too long."""
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        self._poller.add(self)
        return self

    def __exit__(self, *_error: object) -> None:
        self._poller.remove(self)
        self.job = self.then = self.error = None  # which refer to it: the session would live until it is collected

    def _asleep(self, until: float | None) -> asyncio.Future[None]:
        """To be awaited, and `_awake` called in any case; `on_deadline` is called at `until`, on the loop's clock.

        Not a coroutine: that would cost memory for every waiter.
        """
        self._signal = asyncio.get_running_loop().create_future()
        self._set_alarm(until)
        return self._signal

    def _set_alarm(self, when: float | None) -> None:
        self._alarm_at, self._alarm = when, None
        self.set_timer(asyncio.get_running_loop())

    def set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        """If the alarm is near and has none; called again and again, since most waits are over before it is."""
        when = self._alarm_at
        if when is not None and self._alarm is None and when < loop.time() + NEAR_SECONDS:
            self._alarm = loop.call_at(when, self.on_deadline, when, context=self._poller.context)

    def _awake(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._signal = self._alarm = self._alarm_at = None

    def wake(self) -> None:
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(None)

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.wake()

    def on_read_error(self, error: Exception) -> None:
        """The shared read of its row has failed, and not because PostgreSQL is away."""
        self.fail(error)

    def on_job_unreadable(self, error: Exception) -> None:
        """The shared read of its job has failed, or has found no job."""
        self.fail(error)

    def last_message(self) -> tuple[bytes, float] | None:
        """The payload of the last message about its row, and when it came."""
        return self._poller.last_message(self.target.key)

    def request(self) -> None:
        self._poller.request(self.target.key)

    def read_before(self, other: Waiter[Any]) -> None:
        """Have this row read, and the other's only if that does not end the wait."""
        self.then = (self._poller.generation + 1, other)
        self.request()

    def on_subscribed(self) -> None:
        """Messages of the row come from now on; when called again, some may have been missed."""
        self.awaits_message = False

    def on_message(self, *, of_row: bool) -> bool:
        """A message about its row, or about the whole table; whether the shared read is to look at the row."""
        return True

    def conclude(self) -> None:
        """The job is done: the row as it is from now on is the answer."""
        self.concluding = True

    def begin_step(self, shown: Baseline | None) -> None:
        """The next wait of a watch; `shown` are the values of the row that the last one has ended with."""
        self.last = self.over = False

    def on_deadline(self, when: float) -> None:
        """Have one last read at the deadline, of the job as well, and wait for it `LAST_READ_SECONDS` at most."""
        if self.last:
            self.give_up()
            return
        self.last = True
        self._set_alarm(when + LAST_READ_SECONDS)
        if self.job is None:
            self.request()
        else:
            self.job.last = True
            self.read_before(self.job)

    def on_last_read(self) -> None:
        """There is nothing more to wait for, if it was the last read of the job as well."""
        if self.job is None:
            self.give_up()

    def give_up(self) -> None:
        self.over = True
        self.wake()

    def timed_out(self, began: float) -> WaitTimeoutError:
        """To be raised; `began` is the loop's time."""
        error = timed_out(self.target, began)
        error.__cause__ = self._poller.error
        return error


def timed_out(target: Target[Any], began: float) -> WaitTimeoutError:
    key = target.key if len(target.key) > 1 else target.key[0]
    waited = asyncio.get_running_loop().time() - began
    message = f"No change detected on {target} in {waited:.1f} s"
    return WaitTimeoutError(message, model=target.mapper.class_, pk_value=key, waited=waited)
