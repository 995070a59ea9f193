"""The waiters for rows of one mapped class, and the one loop that reads for all of them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.orm.attributes import instance_state

from coord.database.target import column_names
from coord.errors import message_of
from coord.observation import tell_waiters
from coord.retryable import is_server_away
from coord.waiting.reader import MAX_KEYS_PER_QUERY, Reader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coord.database.target import Key
    from coord.notify.bell import Bell
    from coord.notify.channels import Channels
    from coord.waiting.waiter import Waiter
    from coord.waiting.watcher import Watcher

    Due = Mapping[Key, list[Any]]

logger = logging.getLogger("coord.waiting")

DEFERRED_READ_SECONDS = 0.1
"""Before the first read of a row that cannot have changed without a message."""
RETRY_INTERVAL_SECONDS = 0.2
"""Between attempts to read while PostgreSQL is away."""


class _Listener(NamedTuple):
    """Of the channel of one row, or with no key of the table's."""

    poller: Poller
    key: Key | None
    channel: bytes

    def subscribed(self) -> None:
        if self.key is not None:
            self.poller.on_subscribed(self.key)

    def on_message(self) -> None:
        self.poller.on_message(self.key)


class Poller:
    """The waiters by key, and a loop that runs while there are any.

    It reads for them all once an interval, the shortest of theirs, from a random moment on; and at once the rows of a
    wait that has just begun, is at its deadline, or had a message. A read counts only for waits that were registered
    before it began, so that none is given a row older than what its caller has seen.

    It outlives its last waiter until it is closed, so that a class that is waited for now and then costs no new ones.
    The loop, and the alarms of its waits, run in an empty `context`: a hook finds no caller's values there.
    """

    def __init__(self, watcher: Watcher, reader: Reader) -> None:
        self.reader = reader
        self.waiters: dict[Key, list[Any]] = {}
        self.context = contextvars.Context()
        self.generation = 0
        """The number of the read that is under way, or was the last."""
        self.error: Exception | None = None
        """Why rows cannot be read at present."""
        self._watcher = watcher
        self._bell: Bell | None = None
        self._channels: Channels | None = None
        self._listeners: dict[Key | None, _Listener] = {}
        self._intervals: Counter[float] = Counter()
        self._due: dict[Key, None] = {}
        self._changed: set[Key] = set()
        """Those of the due rows that had a message: they have probably changed."""
        self._deferred: set[Key] = set()
        """Those to be read after `DEFERRED_READ_SECONDS`."""
        self._awake = asyncio.Event()
        self._closed = False
        self.task: asyncio.Task[None] | None = None

    def add(self, waiter: Waiter[Any]) -> None:
        self._watcher.waiters += waiter.counts
        tell_waiters(waiter.counts)
        key = waiter.target.key
        if None not in self._listeners:
            self._listen(None)
        others = self.waiters.setdefault(key, [])
        others.append(waiter)
        if waiter.interval < self._interval:
            self._awake.set()  # or the loop would sleep on, by a longer one or for want of any
        self._intervals[waiter.interval] += 1
        is_subscribed = self._bell is not None and (len(others) > 1 or self._listen(key))
        waiter.awaits_message = waiter.awaits_message and is_subscribed
        if not waiter.awaits_message and (not is_subscribed or len(others) > 1):
            self.request(key)
        elif waiter.awaits_message:
            self._request_later(key)
        if self.task is None or self.task.done():
            name = f"coord waits for {self.reader.mapper.class_.__name__}"
            self.task = asyncio.create_task(self._run(), name=name, context=self.context)
            self.task.add_done_callback(self._ended)

    def remove(self, waiter: Waiter[Any]) -> None:
        key = waiter.target.key
        self.waiters[key].remove(waiter)
        if not self.waiters[key]:
            del self.waiters[key]
            self._leave(key)
        self._intervals[waiter.interval] -= 1
        if not self._intervals[waiter.interval]:
            del self._intervals[waiter.interval]
        if not self.waiters:
            self._awake.set()
        self._watcher.on_leave(self, waiter)

    def close(self) -> None:
        """It has no waiters, and is given none any more."""
        self._closed = True
        self._leave(None)
        self._awake.set()

    def subscribe(self, bell: Bell | None, channels: Channels | None) -> None:
        """Have messages of this bell from now on, or none."""
        for key in [*self._listeners]:
            self._leave(key)
        self._bell, self._channels = bell, channels
        for key in [None, *self.waiters] if self.waiters else []:
            self._listen(key)

    def _listen(self, key: Key | None) -> bool:
        """Whether `on_subscribed` will be called on confirmation."""
        if self._bell is None or self._channels is None:
            return False
        place = self.reader.mapper, self.reader.schemas
        channel = self._channels.table(*place) if key is None else self._channels.row(*place, key)
        self._listeners[key] = _Listener(self, key, channel)
        self._bell.listen(channel, self._listeners[key])
        return self._bell.connected

    def _leave(self, key: Key | None) -> None:
        if (listener := self._listeners.pop(key, None)) is not None and self._bell is not None:
            self._bell.leave(listener.channel, listener)

    def last_message(self, key: Key) -> tuple[bytes, float] | None:
        """The payload of the last message about the row, and when it came."""
        listener = self._listeners.get(key)
        return None if listener is None or self._bell is None else self._bell.last_message(listener.channel)

    def request(self, key: Key) -> None:
        """Have the row read as soon as can be."""
        self._due[key] = None
        self._awake.set()

    def _request_later(self, key: Key) -> None:
        """Most waits that can await a message are over by then."""
        if not self._deferred:
            asyncio.get_running_loop().call_later(DEFERRED_READ_SECONDS, self._request_deferred)
        self._deferred.add(key)

    def _request_deferred(self) -> None:
        for key in self._deferred & self.waiters.keys():
            self.request(key)
        self._deferred.clear()

    def on_subscribed(self, key: Key) -> None:
        """Have the row read, since earlier messages were missed; later, if its waiters know of none."""
        waiters = self.waiters.get(key, ())
        if not all(waiter.awaits_message for waiter in waiters):
            self.request(key)
        else:
            self._request_later(key)  # for what has come since they began, if they have been read by now
        for waiter in waiters:
            waiter.on_subscribed()

    def on_message(self, key: Key | None) -> None:
        """The row, or with no key any of them, may have changed."""
        for each in [*self.waiters] if key is None else [key]:
            answers = [waiter.on_message(of_row=key is not None) for waiter in self.waiters.get(each, ())]
            if any(answers):
                self.request(each)
                if key is not None:
                    self._changed.add(key)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The task may have been cancelled with all others: no wait may be left without reads."""
        for waiter in [each for waiters in self.waiters.values() for each in waiters] if task.cancelled() else ():
            waiter.fail(RuntimeError("The task that reads for this wait was cancelled."))

    async def _run(self) -> None:
        while not self._closed:
            await self._serve()
            while not self.waiters and not self._closed:
                self._awake.clear()
                await self._awake.wait()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        tick = loop.time() - random.uniform(0, self._interval)  # so that processes do not read in step
        while self.waiters:
            await self._sleep_after(tick)
            if (now := loop.time()) >= tick + self._interval:
                # Ticks stay evenly spaced unless a whole one was missed.
                tick = tick + self._interval if now < tick + 2 * self._interval else now
                self._due |= dict.fromkeys(self.waiters)
            await self._read_due()

    async def _read_due(self) -> None:
        """One query's worth; its waits are woken before the next is held in memory."""
        self.generation += 1
        keys = [key for key in self._due if key in self.waiters]
        due = {key: [*self.waiters[key]] for key in keys[:MAX_KEYS_PER_QUERY]}
        self._due = dict.fromkeys(keys[MAX_KEYS_PER_QUERY:])
        changed, self._changed = self._changed, self._changed & self._due.keys()
        if due:
            await self._poll(due, changed)

    @property
    def _interval(self) -> float:
        return min(self._intervals, default=float("inf"))

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

    async def _poll(self, due: Due, changed: set[Key]) -> None:
        last = [waiter for waiters in due.values() for waiter in waiters if waiter.last]
        try:
            if self.reader.settings is None:
                await self._read_identities(due)
            else:
                await self._read_rows(due, changed)
        except Exception as error:  # noqa: BLE001 - it reaches the waiters, or is tried again
            await self._failed(error, due)
            return
        if self.error is not None:
            logger.warning("PostgreSQL answers again; waits go on")
            self.error = None
        for waiter in last:
            waiter.on_last_read()

    async def _read_identities(self, due: Due) -> None:
        """Which versions of the rows there are, and no values, for waits whose sessions read when they are woken."""
        shared = {key: [waiter for waiter in waiters if not waiter.solo] for key, waiters in due.items()}
        keys = [key for key, waiters in shared.items() if waiters]
        found = await self.reader.identities(keys) if keys else {}
        for key in keys:
            for waiter in shared[key]:
                waiter.on_identity(found.get(key))

    async def _read_rows(self, due: Due, changed: set[Key]) -> None:
        """The watched columns of every row, and the whole row where they differ or a message came."""
        whole = {key for key, waiters in due.items() if key in changed or any(waiter.fresh for waiter in waiters)}
        if rest := [key for key in due if key not in whole]:
            watched = set().union(*{waiter.target.columns for key in rest for waiter in due[key]})
            names = tuple(name for name in column_names(self.reader.mapper) if name in watched)
            found = await self.reader.columns(rest, names)
            for key in rest:
                values = dict(zip(names, found[key][1:], strict=True)) if key in found else None
                # Compared for each of them, since that also completes their baselines.
                if [waiter for waiter in due[key] if values is None or waiter.differs_in(values) is not None]:
                    whole.add(key)
                    continue
                for waiter in due[key]:
                    waiter.on_unchanged()
        rows = await self.reader.entities([*whole]) if whole else {}
        for key in whole:
            row = rows.get(key)
            values = None if row is None else instance_state(row).dict
            for waiter in due[key]:
                waiter.receive(row, values, alone=len(due[key]) == 1)

    async def _failed(self, error: Exception, due: Due) -> None:
        """Try again if the database is away; else find the row that failed: only its waiters get the error."""
        if is_server_away(error):
            if self.error is None:
                logger.warning("Rows cannot be read, waits go on until their deadlines: %s", message_of(error))
            self.error = error
            self._due |= dict.fromkeys(due)
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
        elif len(due) > 1 and not self.reader.concerns_all_rows(error):
            keys = list(due)
            for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
                await self._poll({key: due[key] for key in half}, set())
        else:
            for waiter in [each for waiters in due.values() for each in waiters]:
                waiter.on_read_error(error)
