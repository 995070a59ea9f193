"""The waiters for rows of one mapped class, and the one loop that reads for all of them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import inspect

from coord.target import column_names
from coord.waiting.deadlines import Deadlines
from coord.waiting.reading import is_passing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from coord.target import ColumnNames, Key
    from coord.waiting.hearing import Hearing
    from coord.waiting.reading import Reader
    from coord.waiting.waiter import Waiter

    Due = Mapping[Key, list[Waiter[Any]]]

T = TypeVar("T")

logger = logging.getLogger("coord.waiting")

PATIENCE = 0.02
"""Seconds that a wait takes before it looks at a row to which nothing can have happened unheard."""
RETRY = 0.2
"""Seconds between attempts to read while PostgreSQL is away."""


class Group:
    """The waiters by key, and a loop that runs while there are any.

    It reads them all once an interval, the shortest that any asked for, from a random moment on; and at once the rows
    that somebody has only begun to wait for, will wait for no longer, or has heard a bell for. A look counts only for
    who was waiting before it began, so nobody is shown a row older than what he has seen.
    """

    def __init__(
        self, reader: Reader, hearing: Hearing | None, *, on_leave: Callable[[Group, Waiter[Any]], None]
    ) -> None:
        self.reader = reader
        self.waiters: dict[Key, list[Waiter[Any]]] = {}
        self.deadlines = Deadlines()
        self.generation = 0
        """The number of the look that is under way, or was the last."""
        self.error: Exception | None = None
        """Why rows cannot be read at present."""
        self._hearing = hearing
        self._on_leave = on_leave
        self._intervals: Counter[float] = Counter()
        self._watched: Counter[ColumnNames] = Counter()
        self._due: set[Key] = set()
        self._rung: set[Key] = set()
        """Those of the due rows whose bell was rung: they have probably changed."""
        self._patient: set[Key] = set()
        """Those to be looked at in a little while."""
        self._awake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def add(self, waiter: Waiter[Any]) -> None:
        key = waiter.target.key
        others = self.waiters.setdefault(key, [])
        others.append(waiter)
        if waiter.interval < self._interval:
            self._awake.set()  # or the loop would sleep on by the longer one
        self._intervals[waiter.interval] += 1
        self._watched[waiter.target.columns] += 1
        heard = self._hearing is not None and (len(others) > 1 or self._hearing.listen(self, key))
        waiter.patient = waiter.patient and heard
        if not waiter.patient and (not heard or len(others) > 1):
            self.look(key)
        elif waiter.patient and waiter.curious:
            self._look_later(key)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._run(), name=f"coord waits for {self.reader.mapper.class_.__name__}")
            self.task.add_done_callback(self._ended)

    def remove(self, waiter: Waiter[Any]) -> None:
        key = waiter.target.key
        others = self.waiters[key]
        others.remove(waiter)
        if not others:
            del self.waiters[key]
            if self._hearing is not None:
                self._hearing.leave(self, key)
        _discount(self._intervals, waiter.interval)
        _discount(self._watched, waiter.target.columns)
        if not self.waiters:
            self.hear(None)
            self._awake.set()
        self._on_leave(self, waiter)

    def hear(self, hearing: Hearing | None) -> None:
        """Be woken by another bell from now on, or by none."""
        if self._hearing is not None:
            self._hearing.close()
        self._hearing = hearing
        for key in self.waiters:
            if hearing is not None:
                hearing.listen(self, key)

    def look(self, key: Key) -> None:
        """Have the row read as soon as can be."""
        self._due.add(key)
        self._awake.set()

    def _look_later(self, key: Key) -> None:
        """Most waits that can be patient are over by then."""
        if not self._patient:
            asyncio.get_running_loop().call_later(PATIENCE, self._look_now)
        self._patient.add(key)

    def _look_now(self) -> None:
        patient, self._patient = self._patient, set()
        if due := patient & self.waiters.keys():
            self._due |= due
            self._awake.set()

    def heard(self, key: Key) -> None:
        """Have the row read, since what was rung until now was not heard; but for who knows that nothing was."""
        waiters = self.waiters.get(key, ())
        if not all(waiter.patient for waiter in waiters):
            self.look(key)
        for waiter in waiters:
            waiter.heard()

    def rung(self, key: Key | None) -> None:
        """Have the row read, or all of them, since somebody says that it has changed."""
        if key is None:
            self._due.update(self.waiters)
        elif stay := [waiter for waiter in self.waiters.get(key, ()) if not waiter.passes_on()]:
            self._due.add(stay[0].target.key)
            self._rung.add(key)
        self._awake.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Somebody has cancelled every task there is: nobody may wait for reads that will not come."""
        for waiters in self.waiters.values() if task.cancelled() else ():
            for waiter in waiters:
                waiter.fail(RuntimeError("The task that reads for this wait was cancelled."))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        tick = loop.time() - random.uniform(0, self._interval)  # so that processes do not read in step
        while self.waiters:
            await self._sleep_after(tick)
            if not self.waiters:
                return
            keys: Iterable[Key] = self._due
            if (now := loop.time()) >= tick + self._interval:
                tick, keys = _next(tick, now, self._interval), self.waiters
            self.generation += 1
            due = {key: [*self.waiters[key]] for key in keys if key in self.waiters}
            rung, self._due, self._rung = self._rung, set(), set()
            await self._look(due, rung)

    @property
    def _interval(self) -> float:
        return min(self._intervals, default=0.0)

    async def _sleep_after(self, tick: float) -> None:
        """Until a look is due; the shortest interval may become another meanwhile."""
        loop = asyncio.get_running_loop()
        while self.waiters and not self._due and loop.time() < tick + self._interval:
            self._awake.clear()
            timer = loop.call_at(tick + self._interval, self._awake.set)
            try:
                await self._awake.wait()
            finally:
                timer.cancel()

    async def _look(self, due: Due, rung: AbstractSet[Key]) -> None:
        last = [waiter for waiters in due.values() for waiter in waiters if waiter.last]
        try:
            await self._read(due, rung)
        except Exception as error:  # noqa: BLE001 - it reaches the waiters, or is tried again
            await self._failed(error, due)
            return
        if self.error is not None:
            logger.warning("PostgreSQL answers again; waits go on")
            self.error = None
        for waiter in last:
            waiter.has_looked_last()

    async def _read(self, due: Due, rung: AbstractSet[Key]) -> None:
        """The watched columns of every row; the whole row of those that have changed, or are said to have."""
        whole = {key for key, waiters in due.items() if key in rung or any(waiter.fresh for waiter in waiters)}
        rest = [key for key in due if key not in whole]
        names = self._columns
        found = await self.reader.columns(rest, names) if rest else {}
        for key in rest:
            values = dict(zip(names, found[key][1:], strict=True)) if key in found else None
            if values is None or _any_differs(due[key], values):
                whole.add(key)
            for waiter in () if key in whole else due[key]:
                waiter.seen()
        rows = await self.reader.entities([*whole]) if whole else {}
        for key in whole:
            row = rows.get(key)
            values = None if row is None else inspect(row).dict
            for waiter in due[key]:
                waiter.tell(row, values, alone=len(due[key]) == 1)

    @property
    def _columns(self) -> tuple[str, ...]:
        watched = set().union(*self._watched)
        return tuple(name for name in column_names(self.reader.mapper) if name in watched)

    async def _failed(self, error: Exception, due: Due) -> None:
        """Try again if the database is away; else the waiter whose read it was gets the error, and no other."""
        if is_passing(error):
            if self.error is None:
                logger.warning("Rows cannot be read, waits go on until their deadlines: %s", error)
            self.error = error
            self._due.update(due)
            await asyncio.sleep(RETRY)
        elif len(due) > 1:
            keys = list(due)
            for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
                await self._look({key: due[key] for key in half}, set())
        else:
            for waiters in due.values():
                for waiter in waiters:
                    waiter.fail(error)


def _discount(counter: Counter[T], item: T) -> None:
    counter[item] -= 1
    if not counter[item]:
        del counter[item]


def _next(tick: float, now: float, interval: float) -> float:
    """The beat goes on evenly unless a whole one was missed."""
    return tick + interval if now < tick + 2 * interval else now


def _any_differs(waiters: Iterable[Waiter[Any]], values: Mapping[str, Any]) -> bool:
    """Ask each of them, since asking also completes their baselines."""
    return sum([waiter.differs(values) for waiter in waiters]) > 0
