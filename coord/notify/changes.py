"""Which rows a session's transaction has changed: notified after the outermost commit and never otherwise.

Rows that the ORM flushes count one by one, its bulk statements by table; raw SQL is announced with `announce`. What
sessions change is listened to from the import of this module on, and collected for the engines that are observed,
whichever maker made the session. The connection that a row went by tells its engine, as a session may have several.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import InstanceState, Mapper, ORMExecuteState, Session, SessionTransaction
from sqlalchemy.orm.attributes import get_history

from coord.database.engine import bind_for_writes
from coord.database.target import Key
from coord.observation import tell_committed

Change = tuple[Mapper[Any], Key | None]
"""A row by its key, or with None any row of the table."""
Changed = Mapping[Change, Any]
"""What has changed, and if that is the row of a job to be handed to a worker, the job."""
Notify = Callable[[Session, Changed], bool]
"""Whether it could notify anybody."""

logger = logging.getLogger("coord.bell")

_CHANGES = "coord.changes"
"""In a session's `info`: what it has changed, by engine and savepoint."""
_observed: dict[Dialect, list[Notify]] = {}
"""What is notified, by the engine's dialect: each engine has its own. Of several the first that can is."""


@contextmanager
def observed(dialect: Dialect, notify: Notify) -> Iterator[None]:
    """Notify of what is committed by way of the engine with this dialect, until the block ends."""
    _observed.setdefault(dialect, []).append(notify)
    try:
        yield
    finally:
        _observed[dialect].remove(notify)
        if not _observed[dialect]:
            del _observed[dialect]


def announce(session: Session, dialect: Dialect, change: Change) -> None:
    """Notify of the change after the commit; at once when no transaction is open."""
    if session.in_transaction():
        _collected(session, dialect)[change] = None
    else:
        _notify(dialect, session, {change: None})


def _notify(dialect: Dialect, session: Session, changes: Changed) -> None:
    tell_committed(changes.values())
    any(notify(session, changes) for notify in _observed.get(dialect, ()))


@event.listens_for(Mapper, "after_insert", raw=True)
def _after_insert(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    if connection.dialect in _observed and state.session is not None:
        key = tuple(mapper.primary_key_from_instance(state.obj()))
        _collected(state.session, connection.dialect).setdefault((mapper, key))


@event.listens_for(Mapper, "after_update", raw=True)
def _after_update(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    """SQLAlchemy also calls this for rows whose values are unchanged."""
    if connection.dialect in _observed and _has_changed(mapper, state):
        _after_delete(mapper, connection, state)


@event.listens_for(Mapper, "after_delete", raw=True)
def _after_delete(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    """The row by the key that it had before the flush: no wait is for a row that does not exist yet."""
    if connection.dialect in _observed and state.session is not None and state.identity is not None:
        _collected(state.session, connection.dialect).setdefault((mapper, state.identity))


@event.listens_for(Session, "do_orm_execute")
def _do_orm_execute(state: ORMExecuteState) -> None:
    if _observed and (state.is_update or state.is_delete or state.is_insert) and (mappers := state.all_mappers):
        try:
            dialect = state.session.get_bind(**state.bind_arguments).dialect
        except Exception:  # noqa: BLE001 - a session of shards need not have one engine for it
            return
        for mapper in mappers if dialect in _observed else ():
            _collected(state.session, dialect)[mapper, None] = None


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    """SQLAlchemy calls this at a savepoint's release as well."""
    if session.in_nested_transaction():
        return
    for dialect, savepoints in session.info.pop(_CHANGES, {}).items():
        changes = {change: job for collected in savepoints.values() for change, job in collected.items()}
        if changes:
            _notify(dialect, session, changes)


@event.listens_for(Session, "after_soft_rollback")
def _after_soft_rollback(session: Session, rolled_back: SessionTransaction) -> None:
    for savepoints in session.info.get(_CHANGES, {}).values():
        for savepoint in [*savepoints]:
            if rolled_back in _with_parents(savepoint):
                del savepoints[savepoint]


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, ended: SessionTransaction) -> None:
    """Also of a transaction that was closed without a rollback of its own."""
    if ended.parent is None:
        session.info.pop(_CHANGES, None)


def collect(session: Session, change: Change, job: Any = None, *, beside: Mapper[Any] | None = None) -> None:
    """Notify of it after the outermost commit; nothing if this process has no `Coordinator`.

    `beside` is the class whose engine was used, if not the row's own.
    """
    if _observed and (dialect := written_to(session, beside or change[0])) in _observed:
        _collected(session, dialect)[change] = job


def warn_if_uncoordinated() -> None:
    """Warn, at the first enqueue or wait, that this process has no `Coordinator`."""
    if not _observed:
        _warn_uncoordinated()


@cache
def _warn_uncoordinated() -> None:
    logger.warning(
        "No Coordinator is open in this process: waits go by polling, and jobs start when a worker finds them in the "
        "ledger, up to 5 s after the commit. `async with Coordinator(session_maker, redis=...)` makes both immediate."
    )


def written_to(session: Session, mapper: Mapper[Any]) -> Dialect:
    """The dialect of the engine through which the session writes rows of this class."""
    return session.get_bind(**bind_for_writes(mapper)).dialect


def _has_changed(mapper: Mapper[Any], state: InstanceState[Any]) -> bool:
    """As `Session.is_modified`, at less cost, but what was set to an SQL expression has been expired by now."""
    if state.expired_attributes:
        return True
    instance = state.obj()
    set_names = _names(mapper) - state.unmodified
    return any(get_history(instance, name).has_changes() for name in set_names)


@lru_cache(maxsize=256)
def _names(mapper: Mapper[Any]) -> frozenset[str]:
    """The attributes whose change is a change of the row: columns, and what sets one after the row was flushed."""
    late = (relationship.key for relationship in mapper.relationships if relationship.post_update)
    return frozenset((*mapper.column_attrs.keys(), *late))


def _collected(session: Session, dialect: Dialect) -> dict[Change, Any]:
    """Those of the innermost savepoint, or of the transaction outside any."""
    nested = session.get_nested_transaction()
    by_engine = session.info.setdefault(_CHANGES, {})
    changes: dict[Change, Any] = by_engine.setdefault(dialect, {}).setdefault(nested, {})
    return changes


def _with_parents(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent
