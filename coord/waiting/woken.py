"""Where rows may depend on the session that reads: the shared read only wakes waits, and each session reads its row.

The shared read takes not a row's values but which version of it there is, another one after every change. As long as
that is the one that the session itself found, the row is the same. Where the two keep disagreeing although the
session's row is unchanged, they see different rows, or one of them sees none: from then on that wait reads by itself
at its interval.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper

from coord.database.target import M
from coord.errors import RowNotFoundError
from coord.jobs.model import Job, JobState
from coord.retryable import is_server_away
from coord.waiting.baseline import Baseline, Difference, difference, own_copy
from coord.waiting.job_wait import end_of, job_not_found, job_target
from coord.waiting.session_reader import OwnRow, SessionReader, seconds_left
from coord.waiting.statements import has_identity
from coord.waiting.waiter import LAST_READ_SECONDS, Waiter

Identity = tuple[Any, ...] | None
"""None is that of no row."""

logger = logging.getLogger("coord.waiting")

_UNREAD = ()
_warned: set[Mapper[Any]] = set()
"""The classes that a warning was logged for: one each in a process."""


class WokenWaiter(Waiter[M]):
    """Is woken when its session must read the row."""

    __slots__ = (
        *("_deadline", "_expected", "_fresh", "_identity", "_job_unreadable", "_known", "_own", "_reason", "_shared"),
        *("due", "solo"),
    )

    def __init__(
        self, own: SessionReader[M], baseline: Baseline, *, interval: float, fresh: bool, awaits_message: bool
    ) -> None:
        poller = own.watcher.poller(WokenWaiter, own.target.mapper, own.schemas, None)
        super().__init__(poller, own.target, baseline, interval=interval, awaits_message=awaits_message)
        self._own = own
        self._known = bool(baseline)
        """Whether the session has read the row before."""
        self._fresh = fresh
        """Whether its row is wanted although nothing differs."""
        self.due = own.bound
        """Whether the session is to read."""
        self.solo = own.bound or not has_identity(own.target.mapper)
        """Whether it reads by itself at its interval, and shares no read."""
        self._job_unreadable = own.bound
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

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._expected = None  # as for what the waiter itself refers to

    async def changed(
        self,
        began: float,
        deadline: float | None,
        *,
        until: Callable[[M], bool] | None = None,
        job_id: UUID | None = None,
    ) -> M:
        """The session's own instance, once the row ends the wait; times are the loop's.

        Raises `WaitTimeoutError`, `RowNotFoundError`, what became of the job, or what the session's read has raised.
        """
        self._deadline, self._own.began = deadline, began
        while True:
            while not self.due:
                if self.error is not None or self.over:
                    raise self.error or self.timed_out(began)
                try:
                    await self._asleep(self._next_alarm())
                finally:
                    self._awake()
            self.due, self._expected, told = False, self.then, self._shared
            concluding, own_job_id = self.concluding, job_id if self._job_unreadable else None
            found = await self._read(own_job_id)
            if found is None:
                continue
            concluding = concluding or (own_job_id is not None and _is_done(found.job, own_job_id))
            if found.row is None:
                raise self._not_found()
            self._warn()
            if concluding or await self._ends(found.row, until):
                self._on_tested(found.row)
                self.has_read, self._identity, self._shared = True, found.identity, _UNREAD
                return await self._own.adopt(found.row, deadline)
            self._on_unchanged(found.identity, told)

    def _next_alarm(self) -> float | None:
        """The deadline, or when the read after it is over; or before that the end of its own interval."""
        until = self._deadline
        if self.last and until is not None:
            return until + LAST_READ_SECONDS
        if not self.solo:
            return until
        own = asyncio.get_running_loop().time() + self.interval
        return own if until is None else min(until, own)

    async def _read(self, job_id: UUID | None) -> OwnRow[M] | None:
        """None if the database is away, and the read must be repeated."""
        if seconds_left(self._deadline) <= 0:
            raise self.timed_out(self._own.began)
        identified = not self.solo and self._poller.reader.has_identities
        try:
            return await self._own.read(self._deadline, identified=identified, job_id=job_id)
        except Exception as error:  # noqa: BLE001 - it is raised, or tried again
            await self._failed(error)
            return None

    async def _failed(self, error: Exception) -> None:
        await self._own.before_retry(error, self._deadline)
        self.due = True

    async def _ends(self, row: M, until: Callable[[M], bool] | None) -> bool:
        """Whether the row differs, or `until` is true of one that does. If only PostgreSQL can tell, it does."""
        values = inspect(row).dict
        found: Difference = True
        if not self._fresh:
            found = difference(self.target, self.baseline, values)
        if until is not None and found is not None:
            found = until(row) or None
            self._on_tested(row)
        if not isinstance(found, dict):
            return found is not None
        try:
            if not await self._own.stores(found, self._deadline):
                return True
        except Exception as error:  # noqa: BLE001 - it is raised, or tried again
            if isinstance(error, DBAPIError) and not is_server_away(error):
                return True  # SQL cannot compare it, so the comparison in Python counts
            await self._failed(error)
            return False
        self.baseline.update({name: values[name] for name in found})
        return False

    def _on_tested(self, row: M) -> None:
        """It need not be tested again until it changes."""
        values = inspect(row).dict
        self.baseline = {name: own_copy(values[name]) for name in self.target.columns}
        self._fresh = False

    def _on_unchanged(self, identity: Identity, told: Identity) -> None:
        """The session has read the row, there, and nothing differs; `told` is what the shared read had found before."""
        self.has_read = True
        if not self.solo and self._shared not in (_UNREAD, identity):
            if self._identity == identity and self._shared == told:
                self._go_solo(f"{self.target} is another row, or none, when it is read without a session's context")
            else:
                self.request()  # it has changed in between, or they disagree
        self._identity, self._shared = identity, _UNREAD
        if self.last and self.solo and (self.job is None or self._job_unreadable):
            self.over = True
        if self.then is not None and self.then is self._expected:
            self._go_on()

    def _not_found(self) -> RowNotFoundError:
        if self.has_read:
            return RowNotFoundError(f"{self.target} was deleted")
        hint = "; if the session saw it under settings of its transaction, name these in Coordinator(read_settings=...)"
        return RowNotFoundError(f"{self.target} not found{hint * self._known}")

    def _warn(self) -> None:
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

    def on_message(self, *, of_row: bool) -> bool:
        """The session must read the row; of a whole table perhaps no row has changed, and the shared read tells."""
        self._require(of_row or self.solo)
        return not of_row

    def on_read_error(self, error: Exception) -> None:
        """A hook that needs a context, a table that is not there without one, a view; or what the session will see."""
        self._go_solo(f"the shared read fails with {type(error).__name__}")

    def on_job_unreadable(self, error: Exception) -> None:
        self._job_unreadable = True
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

    def _require(self, due: bool) -> None:
        if due:
            self.due = True
            self.wake()

    def _go_on(self) -> None:
        if self.then is not None:
            self.then[1].request()
        self.then = self._expected = None


def _is_done(job: Job | None, job_id: UUID) -> bool:
    if job is None:
        raise job_not_found(job_target(job_id))
    if (end := end_of(job)) is not None:
        raise end
    return job.state is JobState.DONE
