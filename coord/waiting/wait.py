"""Waiting for a row to change: holding no connection, missing no change, ending by the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from inspect import iscoroutinefunction
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from coord.cancellation import interruptible
from coord.database.engine import AnySession, bind_for_writes, session_of
from coord.database.schemas import Schemas, schemas_in_use
from coord.database.target import M, Target
from coord.database.transaction import connections_in_use, end_transaction, has_written, holds_lock, is_explicit
from coord.durations import Seconds, positive, seconds
from coord.errors import UncommittedChangesError
from coord.jobs.model import Job, ledger_engine
from coord.observation import ObservedWait
from coord.waiting.baseline import Baseline, baseline_of, database_values
from coord.waiting.handed import HandedWaiter
from coord.waiting.job_wait import JobWaiter, job_id_of
from coord.waiting.session_reader import RELEASE_SECONDS, SessionReader
from coord.waiting.waiter import LAST_READ_SECONDS, timed_out
from coord.waiting.watcher import Watcher
from coord.waiting.woken import WokenWaiter

RowWaiter = HandedWaiter[M] | WokenWaiter[M]

_NO_JOB = nullcontext()


async def wait_for_row_change(
    session: AnySession,
    model: type[M],
    pk_value: Any,
    *,
    columns: Sequence[Any] | None = None,
    interval: Seconds = 0.5,
    timeout: Seconds | None = 30.0,
    since: Mapping[str, Any] | M | None = None,
    until: Callable[[M], bool] | None = None,
    job: Job | UUID | None = None,
) -> M:
    """Return the row once one of `columns` (all of them by default) differs from what the caller has seen.

    Seen is `since` (values by attribute name, or an instance), else what the session has loaded or flushed for the row,
    else the row at the call; a row that differs already is returned at once. With `until`, a predicate on a detached
    instance, no change is required: the first row of which it is true is returned. The result is the session's own
    instance, current as after its `refresh`: columns, and the relationships that are mapped eager or were loaded.
    Unflushed changes are kept.

    What is returned was read by the session itself, in the caller's context and under its `schema_translate_map`,
    unless `Coordinator(read_settings=...)` declares what rows depend on.

    With `job` the wait also ends when the job does: done, and the row is returned as it is then, whether or not it has
    changed or `until` is true of it; failed or cancelled, and that is raised.

    No connection is held meanwhile: a transaction that the session began by itself and that has only read is ended; an
    explicit block that has only read is left as it is. Changes by anybody are seen within `interval` seconds; the last
    read begins when `timeout` seconds have passed, and no call lasts more than a second longer.

        job = await enqueue(session, fulfil_order, 7)
        await session.commit()
        order = await wait_for_row_change(session=session, model=Order, pk_value=7, columns=[Order.status], job=job)

    Raises `UncommittedChangesError` at once when the session's transaction has written or is inside a lock's block,
    `RowNotFoundError` when the row or the job is not there or is deleted meanwhile, `WaitTimeoutError`,
    `JobFailedError`, `JobCancelledError`, `TooManyWaitersError`; a `ValueError` for an unknown column, and whatever
    `until` raises.
    """
    session = session_of(session)
    began = asyncio.get_running_loop().time()
    deadline = None if timeout is None else began + seconds("timeout", timeout)
    interval_seconds = positive("interval", interval)
    if job is not None:
        await asyncio.sleep(0)  # its message goes out first, and a worker begins while this wait is registered
    if until is not None and iscoroutinefunction(until):
        raise ValueError("until is a plain function; an asynchronous one would always seem to be true")
    target, job_id = Target.of(model, pk_value, columns), None if job is None else job_id_of(job)
    baseline, schemas = baseline_of(session, target, since), _schemas(session, target)
    if until is not None:  # it may depend on any column
        target = Target.of(model, pk_value, None)
    await _release(session, target, began, deadline)
    own = SessionReader(session, target, schemas)
    ledger = own.watcher if job_id is None else Watcher.of(ledger_engine(session))
    awaits_message = job_id is not None and since is None and until is None and ledger.is_job_pending(job_id)
    waiter = _waiter(own, baseline, interval_seconds, fresh=until is not None, awaits_message=awaits_message)
    its_job = _NO_JOB if job_id is None or own.bound else JobWaiter(waiter, job_id, ledger)
    with waiter, its_job, ObservedWait(session, waiter, job):
        return await waiter.changed(began, deadline, until=until, job_id=job_id)


@asynccontextmanager
async def watch_row(
    session: AnySession,
    model: type[M],
    pk_value: Any,
    *,
    columns: Sequence[Any] | None = None,
    interval: Seconds = 0.5,
    timeout: Seconds | None = None,
    since: Mapping[str, Any] | M | None = None,
) -> AsyncIterator[AsyncIterator[M]]:
    """Iterate over the states of a row: as it is now, unless it equals `since`, then the newest after each change.

    Changes close together may come as one; the last one always comes. Rows are the session's own instance, as from
    `wait_for_row_change`, and what is said there of transactions, connections and errors holds for each step here.
    `timeout` is seconds without a change, after which the iteration raises `WaitTimeoutError`.

        async with watch_row(session, Order, order_id, columns=[Order.status]) as states:
            async for order in states:
                ...
    """
    session = session_of(session)
    limit = None if timeout is None else seconds("timeout", timeout)
    interval_seconds = positive("interval", interval)
    target = Target.of(model, pk_value, columns)
    baseline = {} if since is None else baseline_of(session, target, since)
    own = SessionReader(session, target, _schemas(session, target))
    with _waiter(own, baseline, interval_seconds, fresh=since is None) as waiter:
        async with aclosing(_states(session, waiter, limit)) as states:
            yield states


def _waiter(
    own: SessionReader[M], baseline: Baseline, interval: float, *, fresh: bool, awaits_message: bool = False
) -> RowWaiter[M]:
    """By whose read it goes: the shared one's where it is declared what rows depend on."""
    kind: Any = WokenWaiter if own.settings is None else HandedWaiter
    waiter: RowWaiter[M] = kind(own, baseline, interval=interval, fresh=fresh, awaits_message=awaits_message)
    return waiter


async def _states(session: AsyncSession, waiter: RowWaiter[M], limit: float | None) -> AsyncGenerator[M, None]:
    shown: Baseline | None = None
    while True:
        began = asyncio.get_running_loop().time()
        deadline = None if limit is None else began + limit
        await _release(session, waiter.target, began, deadline)
        waiter.begin_step(shown)
        row = await waiter.changed(began, deadline)
        waiter.baseline = shown = database_values(row, waiter.target)  # it may be newer than what ended the wait
        yield row


async def _release(session: AsyncSession, target: Target[Any], began: float, deadline: float | None) -> None:
    """End a transaction that the session began by itself and has only read in; refuse one that hides the change."""
    if holds_lock(session):
        raise UncommittedChangesError("The wait is inside lock_tables or advisory_lock: leave the block first.")
    if not session.in_transaction():
        return
    limit = None if deadline is None else max(0, deadline - asyncio.get_running_loop().time()) + LAST_READ_SECONDS
    try:
        # Interrupted, it would leave a transaction that nobody can commit any more.
        await interruptible(_end_if_read_only(session), limit=limit, grace=RELEASE_SECONDS)
    except TimeoutError as error:
        raise timed_out(target, began) from error


async def _end_if_read_only(session: AsyncSession) -> None:
    if connections_in_use(session.sync_session) and await has_written(session):
        raise UncommittedChangesError
    if not is_explicit(session):
        await end_transaction(session)


def _schemas(session: AsyncSession, target: Target[Any]) -> Schemas:
    return schemas_in_use(session.sync_session, **bind_for_writes(target.mapper))
