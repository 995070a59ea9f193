"""Where rows may depend on the session that reads: the shared read only wakes waits, and each session reads its row.

The shared read takes not a row's values but where PostgreSQL keeps it, which is another place after every change. As
long as that is where the session itself found it, the row is the same. Where the two keep disagreeing although the
session's row is unchanged, they see different rows, or one of them sees none: from then on that wait reads by itself
at its interval.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from coord.database.target import M
from coord.retryable import sqlstate_of
from coord.waiting.baseline import difference, own_copy
from coord.waiting.poller import Poller
from coord.waiting.statements import has_identity
from coord.waiting.waiter import LAST_READ_SECONDS, Waiter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from sqlalchemy.orm import Mapper

    from coord.database.target import Key, Target
    from coord.waiting.baseline import Baseline, Difference
    from coord.waiting.poller import Due

    Identity = tuple[Any, ...] | None
    """None is that of no row."""

logger = logging.getLogger("coord.waiting")

_UNREAD = ()
_warned: set[Mapper[Any]] = set()
"""The classes that a warning was logged for: one each in a process."""


class WokenWaiter(Waiter[M]):
    """Is woken when its session must read the row."""

    __slots__ = ("_deadline", "_expected", "_identity", "_reason", "_shared", "due", "fresh", "job_unreadable", "solo")

    def __init__(
        self,
        poller: Poller,
        target: Target[M],
        baseline: Baseline,
        *,
        interval: float,
        fresh: bool = False,
        solo: bool = False,
    ) -> None:
        super().__init__(poller, target, baseline, interval=interval)
        self.fresh = fresh
        """Whether its row is wanted although nothing differs."""
        self.due = solo
        """Whether the session is to read."""
        self.solo = solo or not has_identity(target.mapper)
        """Whether it reads by itself at its interval, and shares no read."""
        self.job_unreadable = solo
        """Whether its job is for the session to read as well."""
        self._deadline: float | None = None
        self._expected: tuple[int, Waiter[Any]] | None = None
        """Whose row is to be read after this read of the session's."""
        self._identity: Identity = _UNREAD
        """As the session last read it."""
        self._shared: Identity = _UNREAD
        """As the shared read has just found it."""
        self._reason: object = None
        """Why it reads by itself, until that is logged."""

    async def wanted(self, began: float, deadline: float | None) -> None:
        """Return when the session is to read the row; times are the loop's.

        Raises `WaitTimeoutError`, or what has become of the job.
        """
        loop = asyncio.get_running_loop()
        self._deadline = deadline
        while not self.due:
            if self.error is not None:
                raise self.error
            if self.over:
                raise self.timed_out(began)
            until = deadline + LAST_READ_SECONDS if self.last and deadline is not None else deadline
            own = loop.time() + self.interval if self.solo and not self.last else None
            try:
                await self._asleep(min((each for each in (until, own) if each is not None), default=None))
            finally:
                self._awake()
        self.due, self._expected = False, self.then

    def on_deadline(self, when: float) -> None:
        if self.last:
            self.give_up()
        elif self._deadline is not None and when >= self._deadline:
            super().on_deadline(when)
            self._require(self.solo)
        else:
            self._require(True)

    def on_identity(self, identity: Identity) -> None:
        """Where the shared read has found the row."""
        if identity != self._identity:
            self._shared = identity
            self._require(True)
        elif self.then is not None and self.then[0] <= self._poller.generation:
            self._go_on()

    def on_unchanged(self, identity: Identity) -> None:
        """The session has read the row, there, and nothing differs."""
        self.has_read = True
        if not self.solo and self._shared not in (_UNREAD, identity):
            if self._identity == identity:
                self._go_solo(f"{self.target} is another row, or none, when it is read without a session's context")
            else:
                self.request()  # it has changed in between, or they disagree
        self._identity, self._shared = identity, _UNREAD
        if self.last and self.solo and (self.job is None or self.job_unreadable):
            self.over = True
        if self.then is not None and self.then is self._expected:
            self._go_on()

    def warn(self) -> None:
        """Log that it reads by itself, where that could not be known beforehand and nothing else is wrong."""
        reason, self._reason = self._reason, None
        if reason is None or self.target.mapper in _warned:
            return
        _warned.add(self.target.mapper)
        logger.warning(
            "Waits for %s read by themselves, each at its interval: %s. If rows depend on settings of PostgreSQL, name "
            "these in Coordinator(read_settings=...), and waits share their reads",
            self.target.mapper.class_.__name__,
            reason,
        )

    def on_message(self) -> None:
        self._require(True)

    def on_read_error(self, error: Exception) -> None:
        """A hook that needs a context, a table that is not there without one, a view; or what the session will see."""
        self._go_solo(f"the shared read fails with {type(error).__name__}")

    def on_job_unreadable(self, error: Exception) -> None:
        self.job_unreadable = True
        self._go_solo(f"its job cannot be read without a session's context: {type(error).__name__}")

    def _go_solo(self, reason: str) -> None:
        self.solo, self._reason = True, reason
        self._require(True)

    def read_before(self, other: Waiter[Any]) -> None:
        """At the deadline the shared read tells whether the session must read; a wait that shares none reads itself."""
        super().read_before(other)
        self._require(self.solo or not self.last)

    def conclude(self) -> None:
        super().conclude()
        self._require(True)

    def begin_step(self) -> None:
        """The next wait of a watch."""
        self.last = self.over = False

    def on_returned(self, values: Mapping[str, Any], identity: Identity) -> None:
        """The row that the session has read is handed to its caller."""
        self.on_tested(values)
        self.has_read = True
        self._identity, self._shared = identity, _UNREAD

    def on_tested(self, values: Mapping[str, Any]) -> None:
        """The row was tested, and need not be again until it changes."""
        self.baseline = {name: own_copy(values[name]) for name in self.target.columns}
        self.fresh = False

    def differs_in(self, values: Mapping[str, Any]) -> Difference:
        return True if self.fresh else difference(self.target.mapper, self.baseline, values, self.target.columns)

    def _require(self, due: bool) -> None:
        if due:
            self.due = True
            self.wake()

    def _go_on(self) -> None:
        if self.then is not None:
            self.then[1].request()
        self.then = self._expected = None


class WakingPoller(Poller):
    """Reads where the rows are kept, and none of their values."""

    def on_message(self, key: Key | None) -> None:
        """The sessions of one row must read it; of a whole table perhaps no row has changed."""
        if key is None:
            self._due.update(self.waiters)
            self._awake.set()
        for waiter in self._waiters_of(key):
            if key is not None or waiter.solo:
                waiter.on_message()

    def _waiters_of(self, key: Key | None) -> list[WokenWaiter[Any]]:
        if key is not None:
            return [*self.waiters.get(key, ())]
        return [waiter for waiters in self.waiters.values() for waiter in waiters]

    async def _read(self, due: Due, changed: AbstractSet[Key]) -> None:
        shared = {key: [waiter for waiter in waiters if not waiter.solo] for key, waiters in due.items()}
        keys = [key for key, waiters in shared.items() if waiters]
        found = await self.reader.identities(keys) if keys else {}
        for key in keys:
            for waiter in shared[key]:
                waiter.on_identity(found.get(key))

    def _concerns_all(self, error: Exception) -> bool:
        """A hook of the application's, or a statement that PostgreSQL refuses whatever the values (class 42)."""
        return not isinstance(error, DBAPIError) or sqlstate_of(error).startswith("42")
