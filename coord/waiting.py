"""Waiting for a row to change: holding no connection, missing no change, ending by the deadline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from coord.adoption import adopt
from coord.baseline import baseline_of
from coord.durations import seconds
from coord.errors import UncommittedChangesError, WaitTimeoutError
from coord.group import LAST_LOOK
from coord.target import Target
from coord.transaction import connection_in_use, end_transaction, has_written, holds_lock, is_explicit
from coord.watcher import schemas_of, watcher_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.durations import Seconds
    from coord.target import M


async def wait_for_row_change(
    session: AsyncSession,
    model: type[M],
    pk_value: Any,
    *,
    columns: Sequence[Any] | None = None,
    interval: Seconds = 0.5,
    timeout: Seconds | None = 30.0,
    since: Mapping[str, Any] | M | None = None,
    until: Callable[[M], bool] | None = None,
) -> M:
    """Return the row once one of `columns` (all of them by default) differs from what the caller has seen.

    Seen is `since` (values by attribute name, or an instance), else what the session has loaded or flushed for the row,
    else the row at the call; a row that differs already is returned at once. With `until`, a predicate on a detached
    instance, no change is required: the first row of which it is true is returned. The result is the session's own
    instance, current, with unflushed changes kept.

    No connection is held meanwhile: a transaction that the session began by itself and that has only read is ended; an
    explicit block that has only read is left as it is. Changes by anybody are seen within `interval` seconds; the last
    look is taken when `timeout` seconds have passed, and no call lasts more than a second longer.

        await session.commit()
        order = await wait_for_row_change(session=session, model=Order, pk_value=7, columns=[Order.status])

    Raises `UncommittedChangesError` at once when the session's transaction has written or is inside a lock's block,
    `RowNotFoundError` when the row is not there or is deleted meanwhile, `WaitTimeoutError`, `TooManyWaitersError`; a
    `ValueError` for an unknown column, and whatever `until` raises.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    deadline = None if timeout is None else began + seconds("timeout", timeout)
    beat = _interval(interval)
    target = Target.of(model, pk_value, columns)
    baseline = baseline_of(session, target, since)
    if not await _release(session, deadline):
        raise _timed_out(target, loop.time() - began)
    if until is not None:  # it may depend on any column
        target = Target.of(model, pk_value, None)
    with (
        watcher_of(session) as watcher,
        watcher.register(target, schemas_of(session), baseline, interval=beat, fresh=until is not None) as waiter,
    ):
        while True:
            row = await waiter.changed(deadline)
            if row is None:
                raise _timed_out(target, loop.time() - began, waiter.trouble)
            if until is None or until(row):
                break
    return await adopt(session, row)


async def _release(session: AsyncSession, deadline: float | None) -> bool:
    """End what the session began by itself and only read in; refuse what nobody else could see past.

    False when PostgreSQL has not answered by the deadline; a statement to a server that is gone may hang.
    """
    if holds_lock(session):
        raise UncommittedChangesError("The wait is inside lock_tables or advisory_lock: leave the block first.")
    if not session.in_transaction():
        return True
    loop = asyncio.get_running_loop()
    releasing = asyncio.create_task(_end_if_read_only(session))
    limit = None if deadline is None else max(0, deadline - loop.time()) + LAST_LOOK
    try:
        done, _ = await asyncio.wait([releasing], timeout=limit)
    finally:
        releasing.cancel()
    return bool(done) and releasing.result()


async def _end_if_read_only(session: AsyncSession) -> bool:
    if connection_in_use(session) and await has_written(session):
        raise UncommittedChangesError
    if not is_explicit(session):
        await end_transaction(session)
    return True


def _interval(interval: Seconds) -> float:
    beat = seconds("interval", interval)
    if beat == 0:
        raise ValueError("interval is more than 0 seconds")
    return beat


def _timed_out(target: Target[Any], waited: float, trouble: Exception | None = None) -> WaitTimeoutError:
    key = target.key if len(target.key) > 1 else target.key[0]
    message = f"No change detected on {target} in {waited:.1f} s"
    error = WaitTimeoutError(message, model=target.mapper.class_, pk_value=key, waited=waited)
    error.__cause__ = trouble
    return error
