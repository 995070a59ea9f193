"""The deadlines of many waits by one timer of the event loop: uvloop takes 700 bytes for each of its own."""

from __future__ import annotations

import asyncio
from heapq import heapify, heappop, heappush
from typing import Protocol

TIMER_RESOLUTION_SECONDS = 0.001
"""By which a deadline may be ahead and count as passed: uvloop's timers are as coarse."""


class Sleeper(Protocol):
    """What is notified of its deadline."""

    def on_deadline(self, when: float) -> None:
        """The deadline has passed; it was at `when`, on the loop's clock."""


class Alarm:
    """A deadline and its sleeper, until it has passed or is cancelled."""

    __slots__ = ("sleeper", "when")

    def __init__(self, when: float, sleeper: Sleeper) -> None:
        self.when = when
        self.sleeper: Sleeper | None = sleeper

    def __lt__(self, other: Alarm) -> bool:
        return self.when < other.when


class Deadlines:
    """Alarms of one event loop, the earliest first."""

    def __init__(self) -> None:
        self._alarms: list[Alarm] = []
        self._cancelled = 0
        """How many of the alarms are cancelled."""
        self._timer: asyncio.TimerHandle | None = None

    def set(self, when: float, sleeper: Sleeper) -> Alarm:
        alarm = Alarm(when, sleeper)
        heappush(self._alarms, alarm)
        if self._alarms[0] is alarm:
            self._arm()
        return alarm

    def cancel(self, alarm: Alarm) -> None:
        """Also one that has passed. Most waits end long before, so the heap is rebuilt when half of it is cancelled."""
        if alarm.sleeper is None:
            return
        alarm.sleeper = None
        self._cancelled += 1
        if 2 * self._cancelled > len(self._alarms):
            self._alarms = [alarm for alarm in self._alarms if alarm.sleeper is not None]
            heapify(self._alarms)
            self._cancelled = 0
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._alarms:
            self._timer = asyncio.get_running_loop().call_at(self._alarms[0].when, self._fire)

    def _fire(self) -> None:
        now = asyncio.get_running_loop().time() + TIMER_RESOLUTION_SECONDS
        while self._alarms and self._alarms[0].when <= now:
            alarm = heappop(self._alarms)
            sleeper, alarm.sleeper = alarm.sleeper, None
            if sleeper is None:
                self._cancelled -= 1
            else:
                sleeper.on_deadline(alarm.when)
        self._arm()
