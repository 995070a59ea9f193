"""Where `read_settings` declare what rows depend on: waits are handed the rows of the shared read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect

from coord.database.target import M, column_names
from coord.errors import RowNotFoundError
from coord.waiting.baseline import difference, own_copy
from coord.waiting.poller import Poller
from coord.waiting.waiter import LAST_READ_SECONDS, Waiter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from coord.database.target import Key, Target
    from coord.waiting.baseline import Baseline, Difference
    from coord.waiting.poller import Due
    from coord.waiting.reader import Reader


class HandedWaiter(Waiter[M]):
    """Is handed the newest row that differs from what it has seen."""

    __slots__ = ("_served", "alone", "difference", "fresh", "row")

    def __init__(
        self, poller: Poller, target: Target[M], baseline: Baseline, *, interval: float, fresh: bool = False
    ) -> None:
        super().__init__(poller, target, baseline, interval=interval)
        self.fresh = poller.generation + 1 if fresh else 0
        """The read from which on a row is wanted although nothing differs; 0 for none."""
        self._served = 0
        """The number of the last read that has come to its end; another may be under way."""
        self.row: M | None = None
        self.difference: Difference = None
        """In what that row differs."""
        self.alone = False
        """Whether no other wait was handed the same instance."""

    @property
    def reader(self) -> Reader:
        return self._poller.reader

    async def changed(self, began: float, deadline: float | None) -> M:
        """The newest row that differs from the one before; times are the loop's.

        Raises `WaitTimeoutError`, `RowNotFoundError`, or what the database answered to the read of this row.
        """
        if self.row is None and self.error is None and not self.over:
            self._go_on()  # the last row did not end the wait
            try:
                await self._asleep(deadline + LAST_READ_SECONDS if self.last and deadline is not None else deadline)
            finally:
                self._awake()
        row, self.row = self.row, None
        if row is None and self.error is not None:
            raise self.error
        if row is None:
            raise self.timed_out(began)
        return row

    def receive(self, row: M | None, values: Mapping[str, Any] | None, *, alone: bool) -> None:
        """The row as it is; it is kept if it differs."""
        first, self.has_read = not self.has_read, True
        self._served = self._poller.generation
        if values is None or row is None:
            self.fail(RowNotFoundError(f"{self.target} {'not found' if first else 'was deleted'}"))
            return
        found = self.differs_in(values)
        if found is not None or self._is_wanted:
            self.difference = True if self._is_wanted else self._since_handed(found)
            self.fresh = 0 if self._is_wanted else self.fresh
            self.baseline = {name: own_copy(values[name]) for name in self.target.columns}
            self.row, self.alone = row, alone
            self.wake()
        else:
            self.on_unchanged()

    def _since_handed(self, found: Difference) -> Difference:
        """Of a row that comes on top of one that was not handed out yet: what differs in either."""
        if self.row is None:
            return found
        if isinstance(found, dict) and isinstance(self.difference, dict):
            return found | self.difference
        return True

    def on_unchanged(self) -> None:
        self.has_read = True
        self._served = self._poller.generation
        self._go_on()

    def _go_on(self) -> None:
        if self.then is not None and self.then[0] <= self._served:
            self.then[1].request()
            self.then = None

    @property
    def _is_wanted(self) -> bool:
        """Whether this read is wanted whether or not the row differs."""
        return 0 < self.fresh <= self._poller.generation

    def differs_in(self, values: Mapping[str, Any]) -> Difference:
        return difference(self.target.mapper, self.baseline, values, self.target.columns)

    def begin_step(self) -> None:
        """Forget a row that was read between two steps: the caller may have seen a newer one since."""
        self.last = self.over = False
        if self.row is None:
            return
        self.row = None
        if isinstance(self.difference, dict):
            self.baseline.update(self.difference)
            self.request()
        else:
            self.want_fresh()

    def conclude(self) -> None:
        super().conclude()
        self.want_fresh()

    @property
    def concluded(self) -> bool:
        """Whether the newest row is the last there will be."""
        return self.concluding and not self.fresh

    def want_fresh(self) -> None:
        """A read that has begun already may have found what was before."""
        self.fresh = self._poller.generation + 1
        self.request()


class HandingPoller(Poller):
    """Reads the watched columns of every row, and the whole row where they differ or a message came."""

    def on_message(self, key: Key | None) -> None:
        if key is None:
            self._due.update(self.waiters)
        elif remaining := [waiter for waiter in self.waiters.get(key, ()) if not waiter.defers_to_owner()]:
            self._due.add(remaining[0].target.key)
            self._changed.add(key)
        self._awake.set()

    async def _read(self, due: Due, changed: AbstractSet[Key]) -> None:
        whole = {key for key, waiters in due.items() if key in changed or any(waiter.fresh for waiter in waiters)}
        rest = [key for key in due if key not in whole]
        names = self._columns
        found = await self.reader.columns(rest, names) if rest else {}
        for key in rest:
            values = dict(zip(names, found[key][1:], strict=True)) if key in found else None
            if values is None or _any_differs(due[key], values):
                whole.add(key)
            for waiter in () if key in whole else due[key]:
                waiter.on_unchanged()
        rows = await self.reader.entities([*whole]) if whole else {}
        for key in whole:
            row = rows.get(key)
            values = None if row is None else inspect(row).dict
            for waiter in due[key]:
                waiter.receive(row, values, alone=len(due[key]) == 1)

    @property
    def _columns(self) -> tuple[str, ...]:
        watched = set().union(*self._watched)
        return tuple(name for name in column_names(self.reader.mapper) if name in watched)


def _any_differs(waiters: Iterable[HandedWaiter[Any]], values: Mapping[str, Any]) -> bool:
    """Compares for each of them, since that also completes their baselines."""
    return sum([waiter.differs_in(values) is not None for waiter in waiters]) > 0
