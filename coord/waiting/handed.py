"""Where `read_settings` declare what rows depend on: a wait is handed the rows of the shared read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from coord.cancellation import interruptible
from coord.database.target import M
from coord.errors import RowNotFoundError
from coord.retryable import is_server_away
from coord.waiting.baseline import Baseline, Difference, difference, own_copy
from coord.waiting.poller import RETRY_INTERVAL_SECONDS
from coord.waiting.session_reader import SessionReader, seconds_left
from coord.waiting.waiter import LAST_READ_SECONDS, Waiter


class HandedWaiter(Waiter[M]):
    """Is handed the newest row that differs from what it has seen."""

    __slots__ = ("_alone", "_difference", "_oldest", "_own", "_served", "fresh", "row")

    def __init__(
        self, own: SessionReader[M], baseline: Baseline, *, interval: float, fresh: bool, awaits_message: bool
    ) -> None:
        poller = own.watcher.poller(HandedWaiter, own.target.mapper, own.schemas, own.settings)
        super().__init__(poller, own.target, baseline, interval=interval, awaits_message=awaits_message)
        self._own = own
        self.fresh = 1 if fresh else 0
        """The read from which on a row is wanted although nothing differs; 0 for none."""
        self._oldest = 0
        """The first read whose row counts."""
        self._served = 0
        """The number of the last read that has come to its end; another may be under way."""
        self.row: M | None = None
        self._difference: Difference = None
        """In what that row differs."""
        self._alone = False
        """Whether no other wait was handed the same instance."""

    async def changed(
        self,
        began: float,
        deadline: float | None,
        *,
        until: Callable[[M], bool] | None = None,
        job_id: UUID | None = None,
    ) -> M:
        """The session's own instance, once the row ends the wait; times are the loop's.

        Raises `WaitTimeoutError`, `RowNotFoundError`, or what the database answered to the read of this row.
        """
        self._own.began = began
        while True:
            if self.row is None and self.error is None and not self.over:
                self._go_on()  # the last row did not end the wait
                try:
                    await self._asleep(deadline + LAST_READ_SECONDS if self.last and deadline is not None else deadline)
                finally:
                    self._awake()
            row, self.row = self.row, None
            if row is None:
                raise self.error or self.timed_out(began)
            is_last = self.concluding and not self.fresh
            if is_last or (until(row) if until else await self._has_changed(deadline)):
                return await self._own.adopt(row, deadline, alone=self._alone)

    async def _has_changed(self, deadline: float | None) -> bool:
        """Where Python cannot tell, PostgreSQL compares; if it finds a change the row is read once more."""
        seen, self._difference = self._difference, True
        if not isinstance(seen, dict):
            return True
        compared = self._poller.reader.stores(self.target, seen)
        try:
            if not await interruptible(compared, limit=None if deadline is None else seconds_left(deadline)):
                self._want_fresh()
        except Exception as error:
            if not is_server_away(error):
                if isinstance(error, DBAPIError):
                    return True  # SQL cannot compare it, so the comparison in Python counts
                raise
            if seconds_left(deadline) <= RETRY_INTERVAL_SECONDS:
                raise self.timed_out(self._own.began) from error
            self.baseline.update(seen)
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            self.request()
        return False

    def receive(self, row: M | None, values: Mapping[str, Any] | None, *, alone: bool) -> None:
        """The row as it is; it is kept if it differs."""
        if self._poller.generation < self._oldest:
            self.request()
            return
        first, self.has_read = not self.has_read, True
        self._served = self._poller.generation
        if values is None or row is None:
            self.fail(RowNotFoundError(f"{self.target} {'not found' if first else 'was deleted'}"))
            return
        is_wanted = 0 < self.fresh <= self._poller.generation
        found: Difference = True if is_wanted else self.differs_in(values)
        if found is None:
            self.on_unchanged()
            return
        if self.row is not None:  # which was not taken yet: what differs in either
            earlier = self._difference
            found = found | earlier if isinstance(found, dict) and isinstance(earlier, dict) else True
        self.fresh = 0 if is_wanted else self.fresh
        self.baseline = {name: own_copy(values[name]) for name in self.target.columns}
        self._difference, self.row, self._alone = found, row, alone
        self.wake()

    def differs_in(self, values: Mapping[str, Any]) -> Difference:
        return difference(self.target, self.baseline, values)

    def on_unchanged(self) -> None:
        self.has_read = True
        self._served = self._poller.generation
        self._go_on()

    def _go_on(self) -> None:
        if self.then is not None and self.then[0] <= self._served:
            self.then[1].request()
            self.then = None

    def begin_step(self, shown: Baseline | None) -> None:
        """Forget a row that was read between two steps, or is being read: the caller may know a newer one by now."""
        super().begin_step(shown)
        self._oldest = self._poller.generation + 1
        row, self.row = self.row, None
        if row is not None and shown is not None:
            self.baseline = shown
            self.request()
        elif row is not None:
            self._want_fresh()

    def conclude(self) -> None:
        super().conclude()
        self._want_fresh()

    def _want_fresh(self) -> None:
        """A read that has begun already may have found what was before."""
        self.fresh = self._poller.generation + 1
        self.request()
