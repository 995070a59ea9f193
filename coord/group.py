"""The waiters for rows of one mapped class, and the one loop that reads for all of them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import asyncpg
from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from coord.baseline import differs
from coord.errors import RowNotFoundError
from coord.target import M, column_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coord.baseline import Baseline
    from coord.reading import Reader
    from coord.target import Key, Target

T = TypeVar("T")

logger = logging.getLogger("coord.waiting")

LAST_LOOK = 0.8
"""Seconds after its deadline within which a wait may still learn of a change that was there at the deadline."""
READ_LIMIT = 5.0
"""Seconds after which a shared read is given up and tried again: the server may be gone without a word."""
RETRY = 0.2
"""Seconds between attempts to read while PostgreSQL is away."""


class Waiter(Generic[M]):
    """One wait: what it has seen of its row, and the newest row that differs from that."""

    __slots__ = (
        "_group",
        "_signal",
        "_timer",
        "baseline",
        "error",
        "fresh",
        "interval",
        "last",
        "looked",
        "row",
        "target",
    )

    def __init__(self, group: Group, target: Target[M], baseline: Baseline, *, interval: float, fresh: bool) -> None:
        self._group = group
        self._signal: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.target = target
        self.baseline = baseline
        self.interval = interval
        self.fresh = fresh
        """Whether the next row is wanted although nothing differs."""
        self.looked = False
        self.last = False
        """Whether the deadline has passed and the next look is the last."""
        self.row: M | None = None
        self.error: BaseException | None = None

    async def changed(self, deadline: float | None) -> M | None:
        """The newest row that differs from the one before; None when the loop's clock has passed `deadline`.

        Raises `RowNotFoundError`, or what the database answered to the read of this row.
        """
        loop = asyncio.get_running_loop()
        if self.row is None and self.error is None:
            self._signal = loop.create_future()
            if deadline is not None:
                self._timer = loop.call_at(deadline, self._look_last)
            try:
                await self._signal
            finally:
                if self._timer is not None:
                    self._timer.cancel()
                self._signal = self._timer = None
        if self.error is not None:
            raise self.error
        row, self.row = self.row, None
        return row

    @property
    def trouble(self) -> Exception | None:
        """Why rows cannot be read at present."""
        return self._group.error

    def tell(self, row: M | None, values: Mapping[str, Any] | None) -> None:
        """Look at the row as it is; it is kept if it is news."""
        first, self.looked = not self.looked, True
        if values is None or row is None:
            self.fail(RowNotFoundError(f"{self.target} {'not found' if first else 'was deleted'}"))
        elif self.differs(values) or self.fresh:
            self.fresh = False
            self.baseline = {name: values[name] for name in self.target.columns}
            self.row = row
            self.wake()

    def differs(self, values: Mapping[str, Any]) -> bool:
        return differs(self.target.mapper, self.baseline, values, self.target.columns)

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.wake()

    def wake(self) -> None:
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(None)

    def _look_last(self) -> None:
        self.last = True
        self._timer = asyncio.get_running_loop().call_later(LAST_LOOK, self.wake)
        self._group.look(self.target.key)


class Group:
    """The waiters by key, and a loop that runs while there are any.

    It reads them all once an interval, the shortest that any asked for, from a random moment on; and at once the rows
    that somebody has only begun to wait for, will wait for no longer, or has heard a bell for. A look counts only for
    who was waiting before it began, so nobody is shown a row older than what he has seen.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.waiters: dict[Key, list[Waiter[Any]]] = {}
        self.error: Exception | None = None
        """Why rows cannot be read at present."""
        self._intervals: Counter[float] = Counter()
        self._watched: Counter[tuple[str, ...]] = Counter()
        self._names = column_names(reader.mapper)
        self._due: set[Key] = set()
        self._awake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, waiter: Waiter[Any]) -> None:
        self.waiters.setdefault(waiter.target.key, []).append(waiter)
        self._intervals[waiter.interval] += 1
        self._watched[waiter.target.columns] += 1
        self.look(waiter.target.key)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"coord waits for {self.reader.mapper.class_.__name__}")

    def remove(self, waiter: Waiter[Any]) -> None:
        others = self.waiters[waiter.target.key]
        others.remove(waiter)
        if not others:
            del self.waiters[waiter.target.key]
        _discount(self._intervals, waiter.interval)
        _discount(self._watched, waiter.target.columns)
        if not self.waiters:
            self._awake.set()

    def look(self, key: Key) -> None:
        """Have the row read as soon as can be."""
        self._due.add(key)
        self._awake.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        tick = loop.time() - random.uniform(0, self._interval)  # so that processes do not read in step
        while self.waiters:
            await self._sleep_until(tick + self._interval)
            if not self.waiters:
                return
            now = loop.time()
            keys: Iterable[Key] = self._due
            if now >= tick + self._interval:
                tick, keys = _next(tick, now, self._interval), self.waiters
            due, self._due = {key: [*self.waiters[key]] for key in keys if key in self.waiters}, set()
            await self._look(due)

    @property
    def _interval(self) -> float:
        return min(self._intervals, default=0.0)

    async def _sleep_until(self, tick: float) -> None:
        if not self._due:
            self._awake.clear()
            timer = asyncio.get_running_loop().call_at(tick, self._awake.set)
            await self._awake.wait()
            timer.cancel()

    async def _look(self, due: Mapping[Key, list[Waiter[Any]]]) -> None:
        last = [waiter for waiters in due.values() for waiter in waiters if waiter.last]
        try:
            async with asyncio.timeout(READ_LIMIT):
                await self._read(due)
        except Exception as error:  # noqa: BLE001 - it reaches the waiters, or is tried again
            await self._failed(error, due)
            return
        if self.error is not None:
            logger.warning("PostgreSQL answers again; waits go on")
            self.error = None
        for waiter in last:
            waiter.wake()

    async def _read(self, due: Mapping[Key, list[Waiter[Any]]]) -> None:
        """The watched columns of every row; the whole row of those that have changed."""
        whole = [key for key, waiters in due.items() if any(waiter.fresh for waiter in waiters)]
        rest = [key for key in due if key not in set(whole)]
        if rest:
            found = await self.reader.columns(rest, self._columns)
            for key in rest:
                values = found.get(key)
                if values is None or _any_differs(due[key], values):
                    whole.append(key)
                for waiter in due[key]:
                    waiter.looked = waiter.looked or values is not None
        rows = await self.reader.entities(whole) if whole else {}
        for key in whole:
            row = rows.get(key)
            values = None if row is None else inspect(row).dict
            for waiter in due[key]:
                waiter.tell(row, values)

    @property
    def _columns(self) -> tuple[str, ...]:
        watched = set().union(*self._watched)
        return tuple(name for name in self._names if name in watched)

    async def _failed(self, error: Exception, due: Mapping[Key, list[Waiter[Any]]]) -> None:
        """Try again if the database is away; else the waiter whose read it was gets the error, and no other."""
        if _is_passing(error):
            if self.error is None:
                logger.warning("Rows cannot be read, waits go on until their deadlines: %s", error)
            self.error = error
            self._due.update(due)
            await asyncio.sleep(RETRY)
        elif len(due) > 1:
            keys = list(due)
            for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
                await self._look({key: due[key] for key in half})
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


def _is_passing(error: Exception) -> bool:
    """Whether the database is away or overloaded, as opposed to refusing this statement or its values."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, OSError | TimeoutError | PoolTimeoutError):
        return True
    if isinstance(original, asyncpg.InterfaceError):
        return not isinstance(original, ValueError)  # a key that the driver cannot encode
    return str(getattr(original, "sqlstate", ""))[:2] in {"08", "53", "57"}  # connection, resources, intervention
