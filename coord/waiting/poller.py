"""The waiters for rows of one mapped class, and the one loop that reads for all of them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from coord.retryable import is_server_away
from coord.waiting.deadlines import Deadlines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from coord.database.target import ColumnNames, Key
    from coord.waiting.reader import Reader
    from coord.waiting.subscription import RowSubscription
    from coord.waiting.waiter import Waiter

    Due = Mapping[Key, list[Any]]

T = TypeVar("T")

logger = logging.getLogger("coord.waiting")

DEFERRED_READ_SECONDS = 0.02
"""Before the first read of a row that cannot have changed without a message."""
RETRY_INTERVAL_SECONDS = 0.2
"""Between attempts to read while PostgreSQL is away."""


class Poller(ABC):
    """The waiters by key, and a loop that runs while there are any.

    It reads for them all once an interval, the shortest of theirs, from a random moment on; and at once the rows of a
    wait that has just begun, is at its deadline, or had a message. A read counts only for waits that were registered
    before it began, so that none is given a row older than what its caller has seen.

    The loop runs in an empty `contextvars.Context`: a hook of the application finds no caller's values there.
    """

    def __init__(
        self, reader: Reader, subscription: RowSubscription | None, *, on_leave: Callable[[Poller, Waiter[Any]], None]
    ) -> None:
        self.reader = reader
        self.waiters: dict[Key, list[Any]] = {}
        self.deadlines = Deadlines()
        self.generation = 0
        """The number of the read that is under way, or was the last."""
        self.error: Exception | None = None
        """Why rows cannot be read at present."""
        self._subscription = subscription
        self._on_leave = on_leave
        self._intervals: Counter[float] = Counter()
        self._watched: Counter[ColumnNames] = Counter()
        self._due: set[Key] = set()
        self._changed: set[Key] = set()
        """Those of the due rows that had a message: they have probably changed."""
        self._deferred: set[Key] = set()
        """Those to be read after `DEFERRED_READ_SECONDS`."""
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
        is_subscribed = self._subscription is not None and (len(others) > 1 or self._subscription.listen(self, key))
        waiter.awaits_message = waiter.awaits_message and is_subscribed
        if not waiter.awaits_message and (not is_subscribed or len(others) > 1):
            self.request(key)
        elif waiter.awaits_message and waiter.reads_at_first:
            self._request_later(key)
        if self.task is None or self.task.done():
            name = f"coord waits for {self.reader.mapper.class_.__name__}"
            self.task = asyncio.create_task(self._run(), name=name, context=contextvars.Context())
            self.task.add_done_callback(self._ended)

    def remove(self, waiter: Waiter[Any]) -> None:
        key = waiter.target.key
        others = self.waiters[key]
        others.remove(waiter)
        if not others:
            del self.waiters[key]
            if self._subscription is not None:
                self._subscription.leave(self, key)
        _discount(self._intervals, waiter.interval)
        _discount(self._watched, waiter.target.columns)
        if not self.waiters:
            self.subscribe(None)
            self._awake.set()
        self._on_leave(self, waiter)

    def subscribe(self, subscription: RowSubscription | None) -> None:
        """Use another subscription from now on, or none."""
        if self._subscription is not None:
            self._subscription.close()
        self._subscription = subscription
        for key in self.waiters:
            if subscription is not None:
                subscription.listen(self, key)

    def told(self, key: Key) -> tuple[bytes, float] | None:
        """The payload of the last message about the row, and when it came."""
        return None if self._subscription is None else self._subscription.told(key)

    def request(self, key: Key) -> None:
        """Have the row read as soon as can be."""
        self._due.add(key)
        self._awake.set()

    def _request_later(self, key: Key) -> None:
        """Most waits that can await a message are over by then."""
        if not self._deferred:
            asyncio.get_running_loop().call_later(DEFERRED_READ_SECONDS, self._request_deferred)
        self._deferred.add(key)

    def _request_deferred(self) -> None:
        deferred, self._deferred = self._deferred, set()
        if due := deferred & self.waiters.keys():
            self._due |= due
            self._awake.set()

    def on_subscribed(self, key: Key) -> None:
        """Have the row read, since earlier messages were missed; unless its waiters know that there were none."""
        waiters = self.waiters.get(key, ())
        if not all(waiter.awaits_message for waiter in waiters):
            self.request(key)
        for waiter in waiters:
            waiter.on_subscribed()

    @abstractmethod
    def on_message(self, key: Key | None) -> None:
        """The row, or with no key any of them, may have changed."""

    @abstractmethod
    async def _read(self, due: Due, changed: AbstractSet[Key]) -> None:
        """Read the due rows, and notify their waiters."""

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The task may have been cancelled with all others: no wait may be left without reads."""
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
            changed, self._due, self._changed = self._changed, set(), set()
            await self._poll(due, changed)

    @property
    def _interval(self) -> float:
        return min(self._intervals, default=0.0)

    async def _sleep_after(self, tick: float) -> None:
        """Until a read is due; the shortest interval may become another meanwhile."""
        loop = asyncio.get_running_loop()
        while self.waiters and not self._due and loop.time() < tick + self._interval:
            self._awake.clear()
            timer = loop.call_at(tick + self._interval, self._awake.set)
            try:
                await self._awake.wait()
            finally:
                timer.cancel()

    async def _poll(self, due: Due, changed: AbstractSet[Key]) -> None:
        last = [waiter for waiters in due.values() for waiter in waiters if waiter.last]
        try:
            await self._read(due, changed)
        except Exception as error:  # noqa: BLE001 - it reaches the waiters, or is tried again
            await self._failed(error, due)
            return
        if self.error is not None:
            logger.warning("PostgreSQL answers again; waits go on")
            self.error = None
        for waiter in last:
            waiter.on_last_read()

    async def _failed(self, error: Exception, due: Due) -> None:
        """Try again if the database is away; else find the row that failed: only its waiters get the error."""
        if is_server_away(error):
            if self.error is None:
                logger.warning("Rows cannot be read, waits go on until their deadlines: %s", error)
            self.error = error
            self._due.update(due)
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
        elif len(due) > 1 and not self._concerns_all(error):
            keys = list(due)
            for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
                await self._poll({key: due[key] for key in half}, set())
        else:
            for waiters in due.values():
                for waiter in waiters:
                    waiter.on_read_error(error)

    def _concerns_all(self, _error: Exception) -> bool:
        """Whether the error is not about one key, so that bisecting is useless."""
        return False


def _discount(counter: Counter[T], item: T) -> None:
    counter[item] -= 1
    if not counter[item]:
        del counter[item]


def _next(tick: float, now: float, interval: float) -> float:
    """Ticks stay evenly spaced unless a whole one was missed."""
    return tick + interval if now < tick + 2 * interval else now
