"""A wait of a session for a row: whether it takes the shared read or reads itself, and which row ends it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError

from coord.database.engine import engine_of, own_connection, written
from coord.database.target import M
from coord.errors import RowNotFoundError
from coord.jobs.model import JobState
from coord.notify.changes import warn_if_uncoordinated
from coord.retryable import is_server_away
from coord.waiting.adoption import adopt
from coord.waiting.handed import HandedWaiter
from coord.waiting.job_wait import end_of, job_not_found, job_target
from coord.waiting.own import OwnReader
from coord.waiting.poller import RETRY_INTERVAL_SECONDS
from coord.waiting.reader import READ_TIMEOUT_SECONDS
from coord.waiting.waiter import LAST_READ_SECONDS
from coord.waiting.watcher import Watcher
from coord.waiting.woken import WokenWaiter

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.database.schemas import Schemas
    from coord.database.target import Target
    from coord.waiting.baseline import Baseline, Difference
    from coord.waiting.own import OwnRow
    from coord.waiting.settings import Settings

ADOPTION_TIMEOUT_SECONDS = 5.0
"""That the session may take to load what belongs to a row that ends a wait without a deadline."""


@dataclass(frozen=True, slots=True)
class Wait(Generic[M]):
    """A session and what it waits for, from before its transaction ends."""

    session: AsyncSession
    target: Target[M]
    schemas: Schemas
    settings: Settings | None
    watcher: Watcher

    @classmethod
    def of(cls, session: AsyncSession, target: Target[M], schemas: Schemas) -> Wait[M]:
        warn_if_uncoordinated()
        watcher = Watcher.of(engine_of(session, **written(target.mapper)))
        settings = None if own_connection(session) else watcher.settings_of(session)
        return cls(session, target, schemas, settings, watcher)

    def registered(
        self, baseline: Baseline, *, interval: float, fresh: bool, awaits_message: bool = False
    ) -> _Handed[M] | _Woken[M]:
        """Registered from now until its block ends."""
        bound = own_connection(self.session) is not None
        make: Any = partial(HandedWaiter, fresh=fresh)
        if self.settings is None:
            make = partial(WokenWaiter, fresh=fresh, solo=bound)
        waiter = self.watcher.register(
            self.target,
            self.schemas,
            baseline,
            settings=self.settings,
            interval=interval,
            awaits_message=awaits_message,
            make=make,
        )
        if self.settings is None:
            return _Woken(waiter, self.own_reader(), reads_job=bound, known=bool(baseline))
        return _Handed(waiter, self)

    def own_reader(self) -> OwnReader[M]:
        return OwnReader(self.session, self.target, self.schemas, self.settings, self.watcher.own_reads)


class _Handed(Generic[M]):
    """Takes the rows of the shared read."""

    __slots__ = ("_wait", "waiter")
    reads_job = False

    def __init__(self, waiter: HandedWaiter[M], wait: Wait[M]) -> None:
        self.waiter = waiter
        self._wait = wait

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.waiter.leave()

    async def changed(
        self,
        began: float,
        deadline: float | None,
        *,
        until: Callable[[M], bool] | None = None,
        job_id: UUID | None = None,
    ) -> M:
        waiter = self.waiter
        row = await waiter.changed(began, deadline)
        while not waiter.concluded and not (until(row) if until else await self._has_changed()):
            row = await waiter.changed(began, deadline)
        limit = _limit(deadline)
        return await adopt(self._wait.session, row, alone=waiter.alone, reader=self._wait.own_reader, limit=limit)

    async def _has_changed(self) -> bool:
        """Where Python cannot tell, PostgreSQL compares; if it finds a change the row is read once more."""
        waiter, seen = self.waiter, self.waiter.difference
        if not isinstance(seen, dict):
            return True
        waiter.difference = True
        try:
            if await waiter.reader.stores(waiter.target, seen):
                return False
        except Exception as error:
            if not is_server_away(error):
                if isinstance(error, DBAPIError):
                    return True  # SQL cannot compare it, so the comparison in Python counts
                raise
            waiter.baseline.update(seen)
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            waiter.request()
            return False
        waiter.want_fresh()
        return False


class _Woken(Generic[M]):
    """Reads by itself, when it is woken."""

    __slots__ = ("_known", "_own", "reads_job", "waiter")

    def __init__(self, waiter: WokenWaiter[M], own: OwnReader[M], *, reads_job: bool, known: bool) -> None:
        self.waiter = waiter
        self.reads_job = reads_job
        self._own = own
        self._known = known
        """Whether the session has read the row before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.waiter.leave()

    async def changed(
        self,
        began: float,
        deadline: float | None,
        *,
        until: Callable[[M], bool] | None = None,
        job_id: UUID | None = None,
    ) -> M:
        waiter = self.waiter
        while True:
            await waiter.wanted(began, deadline)
            concluding = waiter.concluding
            found = await self._read(began, deadline, job_id if waiter.job_unreadable else None)
            if found is None:
                continue
            concluding = concluding or self._is_done(found, job_id)
            if found.row is None:
                raise self._not_found()
            waiter.warn()
            values = inspect(found.row).dict
            difference = waiter.differs_in(values)
            if until is not None and difference is not None:
                difference = until(found.row) or None
                waiter.on_tested(values)
            if concluding or await self._has_changed(difference, values, deadline):
                return await self._taken(found, deadline)
            waiter.on_unchanged(found.identity)

    async def _taken(self, found: OwnRow[M], deadline: float | None) -> M:
        waiter = self.waiter
        assert found.row is not None
        waiter.on_returned(inspect(found.row).dict, found.identity)
        own = self._own
        return await adopt(own.session, found.row, alone=True, reader=lambda: own, limit=_limit(deadline))

    async def _read(self, began: float, deadline: float | None, job_id: UUID | None) -> OwnRow[M] | None:
        """None if the database is away, and the read must be repeated."""
        limit = _limit(deadline)
        if limit <= 0:
            raise self.waiter.timed_out(began)
        try:
            return await self._own.read(identified=not self.waiter.solo, job_id=job_id, limit=limit)
        except Exception as error:
            if self._own.shares_errors or not is_server_away(error):
                raise
            if _limit(deadline) <= RETRY_INTERVAL_SECONDS:
                raise self.waiter.timed_out(began) from error
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            self.waiter.due = True
            return None

    def _is_done(self, found: OwnRow[M], job_id: UUID | None) -> bool:
        if job_id is None or not self.waiter.job_unreadable:
            return False
        if found.job is None:
            raise job_not_found(job_target(job_id))
        if (end := end_of(found.job)) is not None:
            raise end
        return found.job.state is JobState.DONE

    async def _has_changed(self, difference: Difference, values: Any, deadline: float | None) -> bool:
        if not isinstance(difference, dict):
            return difference is not None
        try:
            if not await self._own.stores(difference, limit=_limit(deadline)):
                return True
        except DBAPIError as error:
            if is_server_away(error):
                raise
            return True  # SQL cannot compare it, so the comparison in Python counts
        self.waiter.baseline.update({name: values[name] for name in difference})
        return False

    def _not_found(self) -> RowNotFoundError:
        target = self.waiter.target
        if self.waiter.has_read:
            return RowNotFoundError(f"{target} was deleted")
        hint = "; if the session saw it under settings of its transaction, name these in Coordinator(read_settings=...)"
        return RowNotFoundError(f"{target} not found{hint * self._known}")


RowWait = _Handed[M] | _Woken[M]


def _limit(deadline: float | None) -> float:
    """Seconds that a read of the session's may take: no wait ends later than a second after its deadline."""
    if deadline is None:
        return READ_TIMEOUT_SECONDS + ADOPTION_TIMEOUT_SECONDS
    return deadline + LAST_READ_SECONDS - asyncio.get_running_loop().time()
