"""The requester's side of a turn: requests one at a time, or many at once, and what came of each."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from benchmarks.roundtrip.contender import PATIENCE
from benchmarks.roundtrip.orders import DONE

if TYPE_CHECKING:
    from benchmarks.roundtrip.contender import Contender

READY_SECONDS = 60.0
WARM = 8
"""Requests before any is counted."""


@dataclass(slots=True)
class Tally:
    """What came of the requests of one phase."""

    answered: int = 0
    lost: int = 0
    """Had no answer in time, although the row says done."""
    failures: Counter[str] = field(default_factory=Counter)
    microseconds: list[int] = field(default_factory=list)
    """Of each answer that is counted: all, or those inside the window."""


class Requester:
    def __init__(self, contender: Contender, first: int) -> None:
        self._contender = contender
        self._next = first
        """The id of an order."""

    async def prepare(self) -> None:
        """As a program of its own does it before a deploy: none of its connections is left."""
        await self._contender.prepare()
        await self._contender.orders.engine.dispose()

    async def begin(self) -> None:
        """Return when the worker works."""
        await self._contender.open()
        tally = Tally()
        deadline = perf_counter() + READY_SECONDS
        while not tally.answered:
            await self._request(tally)
            if perf_counter() > deadline:
                raise RuntimeError(f"no request was answered in {READY_SECONDS:.0f} s: {tally}")
        for _ in range(WARM):
            await self._request(tally)

    async def one_at_a_time(self, requests: int, seconds: float, think: float) -> Tally:
        """So many, or as many as begin in that time, each after up to `think` seconds of doing nothing."""
        tally = Tally()
        end = perf_counter() + seconds
        while perf_counter() < end and tally.answered < requests:
            await asyncio.sleep(random.uniform(0, think))
            if took := await self._request(tally):
                tally.microseconds.append(took)
        return tally

    async def at_once(self, requesters: int, warm: float, seconds: float) -> Tally:
        """Each requests again as soon as it has its answer; answers in the `seconds` after `warm` are counted."""
        tally = Tally()
        begin = perf_counter() + warm
        end = begin + seconds

        async def loop() -> None:
            while perf_counter() < end:
                took = await self._request(tally)
                if took and begin <= perf_counter() < end:
                    tally.microseconds.append(took)

        await asyncio.gather(*(loop() for _ in range(requesters)))
        return tally

    async def _request(self, tally: Tally) -> int | None:
        """Microseconds to the answer, None without one."""
        order_id, self._next = self._next, self._next + 1
        began = perf_counter()
        try:
            async with asyncio.timeout(PATIENCE):
                status = await self._contender.request(order_id)
        except TimeoutError:
            await self._without_answer(order_id, tally)
            return None
        except Exception as error:  # noqa: BLE001 - counted
            tally.failures[f"{type(error).__name__}: {error}"[:200]] += 1
            return None
        if status != DONE:
            tally.failures[f"answered, but the row says {status}"] += 1
            return None
        tally.answered += 1
        return round((perf_counter() - began) * 1e6)

    async def _without_answer(self, order_id: int, tally: Tally) -> None:
        status = await self._contender.orders.status(order_id)
        if status == DONE:
            tally.lost += 1
        else:
            tally.failures[f"no answer in {PATIENCE:g} s, and the row says {status}"] += 1
