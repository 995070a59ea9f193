"""Deadlines: each is told once, when it has passed, and a cancelled one leaves nothing."""

from __future__ import annotations

import asyncio
import random

from coord.waiting.deadlines import TIMER_RESOLUTION_SECONDS, Deadlines
from tests.serving import eventually


class Sleeper:
    """Notes when it was told, and how long ago that should have been."""

    def __init__(self, told: list[float]) -> None:
        self._told = told

    def on_deadline(self, when: float) -> None:
        assert asyncio.get_running_loop().time() >= when - TIMER_RESOLUTION_SECONDS
        self._told.append(when)


async def test_every_deadline_is_told_once_and_in_order() -> None:
    now, chance = asyncio.get_running_loop().time(), random.Random(3)
    deadlines, told = Deadlines(), list[float]()
    times = [now + chance.uniform(-0.1, 0.2) for _ in range(200)]
    alarms = [deadlines.set(when, Sleeper(told)) for when in times]
    for alarm in alarms[::3]:
        deadlines.cancel(alarm)
    left = sorted(when for n, when in enumerate(times) if n % 3)
    await eventually(lambda: len(told) >= len(left))
    assert told == left
    for alarm in alarms:
        deadlines.cancel(alarm)
    assert deadlines._alarms == []


async def test_cancelled_deadlines_leave_neither_alarms_nor_a_timer() -> None:
    loop = asyncio.get_running_loop()
    deadlines, told = Deadlines(), list[float]()
    first = deadlines.set(loop.time() + 60, Sleeper(told))
    for _ in range(1_000):
        deadlines.cancel(deadlines.set(loop.time() + 60, Sleeper(told)))
        assert len(deadlines._alarms) <= 3
    deadlines.cancel(first)
    assert deadlines._alarms == []
    assert deadlines._timer is None


async def test_a_deadline_set_when_another_has_passed_is_told_as_well() -> None:
    deadlines, told = Deadlines(), list[float]()

    class Twice(Sleeper):
        def on_deadline(self, when: float) -> None:
            super().on_deadline(when)
            if len(told) == 1:
                deadlines.set(when + 0.02, self)

    deadlines.set(asyncio.get_running_loop().time(), Twice(told))
    await eventually(lambda: len(told) == 2)
    assert deadlines._timer is None
