"""How a row that a shared read has found becomes the caller's session's own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import inspect
from sqlalchemy.exc import InvalidRequestError

from coord.errors import RowNotFoundError
from coord.target import column_names, describe
from coord.transaction import end_transaction, is_explicit

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import InstanceState

M = TypeVar("M")


async def adopt(session: AsyncSession, row: M, *, alone: bool) -> M:
    """The session's own instance of the detached `row`, every column loaded and current.

    No query and no connection is needed, unless the session's instance has unflushed changes: those stay, and the
    rest of it is read again. `alone` is whether nobody else was shown this instance, so that it may be the one.
    """
    state: InstanceState[M] = inspect(row)
    assert state.key is not None
    own: M | None = session.sync_session.identity_map.get(state.key)
    if own is not None and inspect(own).modified:
        await _refresh_unmodified(session, own)
        return own
    state.load_options = ()  # those of the shared read are not the caller's
    if own is None and alone:
        session.sync_session.add(row)
        return row
    return _merged(session, row, own)


def _merged(session: AsyncSession, row: M, own: M | None) -> M:
    state: InstanceState[M] = inspect(row)
    if own is not None:
        state.load_options = inspect(own).load_options
        version = state.mapper.version_id_col
        if version is not None:  # or merge() takes a newer version for a conflict
            session.sync_session.expire(own, [state.mapper.get_property_by_column(version).key])
    for name in column_names(state.mapper):
        if isinstance(state.dict.get(name), list | dict | set | bytearray):  # other waiters have the same object
            state.dict[name] = copy.deepcopy(state.dict[name])
    return session.sync_session.merge(row, load=False)


async def _refresh_unmodified(session: AsyncSession, own: Any) -> None:
    state = inspect(own)
    names = [name for name in column_names(state.mapper) if not state.attrs[name].history.has_changes()]
    try:
        with session.no_autoflush:
            await session.refresh(own, names)
    except InvalidRequestError as error:
        raise RowNotFoundError(f"{describe(state.mapper, state.identity)} was deleted") from error
    if not is_explicit(session):
        await end_transaction(session)
