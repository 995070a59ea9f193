"""What the caller has already seen of the row, so that a change made before the wait began is not missed."""

from __future__ import annotations

import copy
import enum
import uuid
import warnings
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import Boolean, Date, Enum, Integer, LargeBinary, String, Uuid, inspect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import PassiveFlag
from sqlalchemy.orm.attributes import get_history
from sqlalchemy.types import TypeEngine

from coord.database.target import Target

Baseline = dict[str, Any]
"""Values by attribute name. Watched columns that are absent take the first value that the wait reads."""
Difference = Baseline | Literal[True] | None
"""None; true; or the baseline of those columns of which only PostgreSQL can tell whether they differ."""

_CONSTANT = (str, int, float, bytes, type(None), Decimal, date, time, timedelta, uuid.UUID, enum.Enum)
_EXACT: list[tuple[type[TypeEngine[Any]], type]] = [
    (Integer, int),
    (Boolean, bool),
    (Enum, enum.Enum),
    (Enum, str),
    (Date, date),
    (Uuid, uuid.UUID),
    (LargeBinary, bytes),
]


def baseline_of(session: AsyncSession, target: Target[Any], since: object) -> Baseline:
    """`since=` if given, else the database values that the session has loaded or last flushed for the row."""
    if isinstance(since, Mapping):
        if unknown := [name for name in since if name not in target.columns]:
            watched = list(target.columns)
            raise ValueError(f"since has {unknown}, which are not watched; {target} is watched for {watched}")
        return dict(since)
    if since is not None:
        if not isinstance(since, target.mapper.class_):
            raise ValueError(f"since is a mapping or a {target.mapper.class_.__name__}, not {since!r}")
        state = inspect(since)
        if state.transient:  # it was never in the database
            return {name: state.dict[name] for name in target.columns if name in state.dict}
        return database_values(since, target)
    instance = session.sync_session.identity_map.get(target.mapper.identity_key_from_primary_key(target.key))
    if not isinstance(instance, target.mapper.class_):  # or it was another subclass's row
        return {}
    values = database_values(instance, target)
    if not values and inspect(instance).expired:
        _warn_expired(target)
    return values


def database_values(instance: object, target: Target[Any]) -> Baseline:
    """The watched columns as they were last read from or flushed to the database; unflushed changes do not count."""
    values: Baseline = {}
    for name in target.columns:
        history = get_history(instance, name, PassiveFlag.PASSIVE_NO_INITIALIZE)
        if history.deleted:
            values[name] = own_copy(history.deleted[0])
        elif history.unchanged:
            values[name] = own_copy(history.unchanged[0])
    return values


def _warn_expired(target: Target[Any]) -> None:
    warnings.warn(
        f"The session's {target} was expired by a commit or rollback, so the wait starts from the row as it is now and "
        "may miss a change made since. Use expire_on_commit=False, since= or until=.",
        stacklevel=4,
    )


def difference(target: Target[Any], baseline: Baseline, values: Mapping[str, Any]) -> Difference:
    """In what a watched column has another value than the baseline, which is completed from `values`."""
    doubtful: Baseline = {}
    for name in target.columns:
        value = values[name]
        seen = baseline.setdefault(name, value)
        kind = target.mapper.columns[name].type
        if seen is value or kind.compare_values(seen, value) is True:  # equality of arrays may be an array
            continue
        if is_certain(kind, seen, value):
            return True
        doubtful[name] = seen
    return doubtful or None


def is_certain(kind: TypeEngine[Any], seen: Any, value: Any) -> bool:
    """Whether values of this type that differ in Python differ in PostgreSQL, so that PostgreSQL need not compare."""
    if seen is None or value is None:
        return True
    if isinstance(kind, String) and not isinstance(kind, Enum):
        # CHAR(n) pads with spaces and VARCHAR(n) cuts them off, whatever the mapping calls the column.
        return isinstance(seen, str) and isinstance(value, str) and seen.rstrip(" ") != value.rstrip(" ")
    if type(seen) is not type(value) and not (isinstance(seen, uuid.UUID) and isinstance(value, uuid.UUID)):
        return False
    return any(isinstance(kind, exact) and isinstance(value, python) for exact, python in _EXACT)


def own_copy(value: Any) -> Any:
    """A value that may be changed in place, as one of which that cannot be seen elsewhere."""
    if isinstance(value, _CONSTANT):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - what cannot be copied, as asyncpg's Path, is one for all
        return value
