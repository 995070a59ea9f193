"""How a row that a shared read has found becomes the caller's session's own, without a query."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import inspect
from sqlalchemy.orm import RelationshipDirection
from sqlalchemy.orm.attributes import set_committed_value

from coord.target import column_names
from coord.waiting.baseline import own_copy

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import InstanceState

M = TypeVar("M")


def adopt(session: AsyncSession, row: M, *, alone: bool) -> M:
    """The session's own instance of the detached `row`, every column current but those with unflushed changes.

    `alone` is whether nobody else was shown this instance, so that it may be the one.
    """
    state: InstanceState[M] = inspect(row)
    assert state.key is not None
    own: M | None = session.sync_session.identity_map.get(state.key)
    if own is not None:
        _update(session, own, state)
        return own
    state.load_options = ()  # those of the shared read are not the caller's
    if not alone:
        for name in column_names(state.mapper):
            state.dict[name] = own_copy(state.dict[name])
        return session.sync_session.merge(row, load=False)
    session.sync_session.add(row)
    return row


def _update(session: AsyncSession, own: M, row: InstanceState[M]) -> None:
    """Do to an instance what a refresh would, with the values at hand; merge() would take its changes away."""
    state: InstanceState[M] = inspect(own)
    unmodified = [
        name
        for name in column_names(state.mapper)
        if name not in state.committed_state or not state.attrs[name].history.has_changes()
    ]
    changed = {name for name in unmodified if state.dict.get(name, row) != row.dict[name]}
    for name in unmodified:
        set_committed_value(own, name, own_copy(row.dict[name]))
    for computed in state.mapper.column_attrs:
        if computed.key in row.dict and computed.key not in column_names(state.mapper):
            set_committed_value(own, computed.key, row.dict[computed.key])
    state.manager.dispatch.refresh(state, None, unmodified)  # composites and mutable values listen for it
    outdated = [
        relationship.key
        for relationship in state.mapper.relationships
        if relationship.direction is RelationshipDirection.MANYTOONE
        and relationship.key in state.dict
        and not state.attrs[relationship.key].history.has_changes()
        and changed & {state.mapper.get_property_by_column(column).key for column in relationship.local_columns}
    ]
    if outdated:
        session.sync_session.expire(own, outdated)
