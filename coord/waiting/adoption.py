"""How the row that ends a wait becomes the session's own, current as after its `refresh`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.orm.attributes import set_committed_value

from coord.database.target import EAGER, M, column_names
from coord.waiting.baseline import own_copy

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import InstanceState, Mapper

    from coord.waiting.own import OwnReader


async def adopt(waiting: AsyncSession, row: M, *, alone: bool, reader: Callable[[], OwnReader[M]], limit: float) -> M:
    """The session's own instance of the detached `row`, without a query where there is nothing else to be loaded.

    `alone` is whether no other wait was handed this instance, so that it may become the session's.
    """
    session = waiting.sync_session
    state: InstanceState[M] = inspect(row)
    assert state.key is not None
    own: M | None = session.identity_map.get(state.key)
    if _has_more_than_columns(state.mapper, own):
        return await reader().refreshed(own, limit=limit)
    if own is not None or not alone:
        for name in column_names(state.mapper):
            state.dict[name] = own_copy(state.dict[name])
        if own is not None and state.mapper.version_id_col is not None:
            # merge() refuses another version as that of an outdated row.
            version = state.mapper.get_property_by_column(state.mapper.version_id_col).key
            set_committed_value(own, version, state.dict[version])
        return session.merge(row, load=False)
    session.add(row)
    return row


def _has_more_than_columns(mapper: Mapper[Any], own: Any) -> bool:
    """Whether only the session itself can make its instance current: related rows, parts, changes not flushed."""
    if _has_eager_relationships(mapper):
        return True
    if own is None:
        return False
    state = inspect(own)
    return bool(state.modified or mapper.composites or any(each.key in state.dict for each in mapper.relationships))


@lru_cache(maxsize=256)
def _has_eager_relationships(mapper: Mapper[Any]) -> bool:
    return any(each.lazy in EAGER for each in mapper.relationships)
