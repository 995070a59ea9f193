"""One wait: what it has seen of its row, and the newest row that differs from that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Self

from coord.errors import RowNotFoundError, WaitTimeoutError
from coord.target import M
from coord.waiting.baseline import differs, own_copy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coord.target import Target
    from coord.waiting.baseline import Baseline
    from coord.waiting.deadlines import Alarm
    from coord.waiting.group import Group

LAST_LOOK = 0.8
"""Seconds after its deadline within which a wait may still learn of a change that was there at the deadline."""


class Waiter(Generic[M]):
    """A place among those who wait for rows of one mapped class."""

    counts = 1
    """How many it is of those that a process may have."""
    curious = True
    """Whether it looks at its row although its bell does not ring and it is not time."""
    __slots__ = (
        "_alarm",
        "_group",
        "_signal",
        "alone",
        "baseline",
        "concluding",
        "error",
        "fresh",
        "interval",
        "job",
        "last",
        "looked",
        "over",
        "patient",
        "row",
        "target",
        "then",
        "told",
    )

    def __init__(self, group: Group, target: Target[M], baseline: Baseline, *, interval: float, fresh: bool) -> None:
        self._group = group
        self._signal: asyncio.Future[None] | None = None
        self._alarm: Alarm | None = None
        self.target = target
        self.baseline = baseline
        self.interval = interval
        self.fresh = group.generation + 1 if fresh else 0
        """The look from which on a row is wanted although nothing differs; 0 for none."""
        self.concluding = False
        """Whether that row is the last, whatever it is."""
        self.looked = False
        self.patient = False
        """Whether nothing can have happened to the row before its bell is heard."""
        self.job: Waiter[Any] | None = None
        """Who waits for the job that may end this wait."""
        self.then: tuple[int, Waiter[Any]] | None = None
        """Whose row to look at after the look with this number, unless that ends the wait."""
        self.told = 0
        """The number of the last look that has come to its end; another may be under way."""
        self.last = False
        """Whether the deadline has passed and the next look is the last."""
        self.over = False
        """Whether that look is done, or has taken too long."""
        self.row: M | None = None
        self.alone = False
        """Whether nobody else was shown the same instance."""
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._group.remove(self)

    async def changed(self, began: float, deadline: float | None) -> M:
        """The newest row that differs from the one before; times are the loop's.

        Raises `WaitTimeoutError`, `RowNotFoundError`, or what the database answered to the read of this row.
        """
        if self.row is None and self.error is None and not self.over:
            self._look_on()  # who asks again was not content with what the look has found
            self._signal = asyncio.get_running_loop().create_future()
            if deadline is not None:
                self._alarm = self._group.deadlines.set(deadline + LAST_LOOK if self.last else deadline, self)
            try:
                await self._signal
            finally:
                if self._alarm is not None:
                    self._group.deadlines.cancel(self._alarm)
                self._signal = self._alarm = None
        row, self.row = self.row, None
        if row is None and self.error is not None:
            raise self.error
        if row is None:
            raise timed_out(self.target, began) from self._group.error
        return row

    def tell(self, row: M | None, values: Mapping[str, Any] | None, *, alone: bool) -> None:
        """Look at the row as it is; it is kept if it is news."""
        first, self.looked = not self.looked, True
        self.told = self._group.generation
        if values is None or row is None:
            self.fail(RowNotFoundError(f"{self.target} {'not found' if first else 'was deleted'}"))
        elif self.differs(values) or self._is_wanted:
            self.fresh = 0 if self._is_wanted else self.fresh
            self.baseline = {name: own_copy(values[name]) for name in self.target.columns}
            self.row, self.alone = row, alone
            self.wake()
        else:
            self.seen()

    @property
    def _is_wanted(self) -> bool:
        """Whether this look was waited for, be it news or not."""
        return 0 < self.fresh <= self._group.generation

    def seen(self) -> None:
        """A look at the row was no news."""
        self.looked = True
        self.told = self._group.generation
        self._look_on()

    def _look_on(self) -> None:
        if self.then is not None and self.then[0] <= self.told:
            self.then[1].look()
            self.then = None

    def look(self) -> None:
        self._group.look(self.target.key)

    def look_first(self, other: Waiter[Any]) -> None:
        """Look at this row, and at the other's only if that does not end the wait."""
        self.then = (self._group.generation + 1, other)
        self.look()

    def heard(self) -> None:
        """The row's bell is heard from now on; a later time that this is said it was not meanwhile."""
        self.patient = False

    def passes_on(self) -> bool:
        """Whether somebody else looks first when the row's bell rings."""
        return False

    def differs(self, values: Mapping[str, Any]) -> bool:
        return differs(self.target.mapper, self.baseline, values, self.target.columns)

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.wake()

    def wake(self) -> None:
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(None)

    def look_again(self) -> None:
        """Forget a row that was read while nobody asked for it: its reader may have seen a newer one since."""
        self.last = self.over = False
        if self.row is not None:
            self.row = None
            self._want_fresh()

    def conclude(self) -> None:
        """Nothing is to be expected any more: the row as it is from now on is the answer."""
        self.concluding = True
        self._want_fresh()

    @property
    def concluded(self) -> bool:
        """Whether the newest row is the last there will be."""
        return self.concluding and not self.fresh

    def _want_fresh(self) -> None:
        """A look that has begun already may have read what was before."""
        self.fresh = self._group.generation + 1
        self.look()

    def overdue(self, when: float) -> None:
        """Have one last look at the deadline, at the job as well, and wait for it no longer than `LAST_LOOK`."""
        if self.last:
            self.give_up()
            return
        self.last = True
        self._alarm = self._group.deadlines.set(when + LAST_LOOK, self)
        if self.job is None:
            self.look()
        else:
            self.job.last = True
            self.look_first(self.job)

    def has_looked_last(self) -> None:
        """There is nothing more to wait for, if it was the last look at the job as well."""
        if self.job is None:
            self.give_up()

    def give_up(self) -> None:
        self.over = True
        self.wake()


def timed_out(target: Target[Any], began: float) -> WaitTimeoutError:
    key = target.key if len(target.key) > 1 else target.key[0]
    waited = asyncio.get_running_loop().time() - began
    message = f"No change detected on {target} in {waited:.1f} s"
    return WaitTimeoutError(message, model=target.mapper.class_, pk_value=key, waited=waited)
