"""Which rows a session's transaction has changed: notified after the outermost commit and never otherwise."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import get_history

from coord.database.engine import written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Connection
    from sqlalchemy.engine import Dialect
    from sqlalchemy.orm import InstanceState, ORMExecuteState, SessionTransaction

    from coord.database.target import Key

    Change = tuple[Mapper[Any], Key | None]
    """A row by its key, or with None any row of the table."""
    Changed = Mapping[Change, Any]
    """What has changed, and if that is the row of a job to be handed to a worker, the job."""
    Notify = Callable[[Session, Changed], bool]
    """Whether somebody could be notified."""

logger = logging.getLogger("coord.bell")

_CHANGES = "coord.changes"
_observed: dict[Dialect, list[Changes]] = {}
"""Who collects an engine's changes, by its dialect: each engine has its own."""


class Changes:
    """Collects what sessions change by way of the engine with this dialect, whichever maker made them.

    Of several for one engine the first that can notify anybody does.
    Rows that the ORM flushes count one by one, its bulk statements by table; raw SQL is announced with `add`. The
    connection that a row went by tells its engine, as a session may have several.
    """

    def __init__(self, dialect: Dialect, notify: Notify) -> None:
        self._dialect = dialect
        self._notify = notify

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Listen on SQLAlchemy's `Mapper` and `Session` until the block ends."""
        with ExitStack() as stack:
            _listen(stack, Mapper, "after_insert", self._after_insert, raw=True)
            _listen(stack, Mapper, "after_update", self._after_update, raw=True)
            _listen(stack, Mapper, "after_delete", self._after_delete, raw=True)
            _listen(stack, Session, "do_orm_execute", self._do_orm_execute)
            _listen(stack, Session, "after_commit", self._after_commit)
            _listen(stack, Session, "after_soft_rollback", self._after_soft_rollback)
            _listen(stack, Session, "after_transaction_end", self._after_transaction_end)
            observers = _observed.setdefault(self._dialect, [])
            observers.append(self)
            try:
                yield
            finally:
                observers.remove(self)
                if not observers:
                    del _observed[self._dialect]

    def add(self, session: Session, change: Change) -> None:
        """Notify of the change after the commit; at once when no transaction is open."""
        if session.in_transaction():
            _collected(session, self._dialect)[change] = None
        else:
            self._notify_one(session, {change: None})

    def _notify_one(self, session: Session, changes: Changed) -> None:
        any(each._notify(session, changes) for each in _observed.get(self._dialect, ()))

    def _after_insert(self, mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
        if connection.dialect is self._dialect and state.session is not None:
            key = tuple(mapper.primary_key_from_instance(state.obj()))
            _collected(state.session, self._dialect).setdefault((mapper, key))

    def _after_update(self, mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
        """SQLAlchemy also calls this for rows whose values are unchanged."""
        if connection.dialect is self._dialect and _has_changed(mapper, state):
            self._after_delete(mapper, connection, state)

    def _after_delete(self, mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
        """The row by the key that it had before the flush: no wait is for a row that does not exist yet."""
        if connection.dialect is self._dialect and state.session is not None and state.identity is not None:
            _collected(state.session, self._dialect).setdefault((mapper, state.identity))

    def _do_orm_execute(self, state: ORMExecuteState) -> None:
        if not (state.is_update or state.is_delete or state.is_insert):
            return
        mappers = state.all_mappers
        if mappers and state.session.get_bind(**state.bind_arguments).dialect is self._dialect:
            for mapper in mappers:
                _collected(state.session, self._dialect)[mapper, None] = None

    def _after_commit(self, session: Session) -> None:
        """SQLAlchemy calls this at a savepoint's release as well."""
        if session.in_nested_transaction():
            return
        changes: dict[Change, Any] = {}
        for collected in session.info.pop((_CHANGES, self._dialect), {}).values():
            changes |= collected
        if changes:
            self._notify_one(session, changes)

    def _after_soft_rollback(self, session: Session, rolled_back: SessionTransaction) -> None:
        if rolled_back.parent is None:
            session.info.pop((_CHANGES, self._dialect), None)
            return
        changes: dict[SessionTransaction | None, Any] = session.info.get((_CHANGES, self._dialect), {})
        for savepoint in [*changes]:
            if rolled_back in _with_parents(savepoint):
                del changes[savepoint]

    def _after_transaction_end(self, session: Session, ended: SessionTransaction) -> None:
        """Closing a session ends its transaction without a rollback of its own."""
        if ended.parent is None:
            session.info.pop((_CHANGES, self._dialect), None)


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
    return session.get_bind(**written(mapper)).dialect


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
    changes: dict[Change, Any] = session.info.setdefault((_CHANGES, dialect), {}).setdefault(nested, {})
    return changes


def _with_parents(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


def _listen(stack: ExitStack, target: Any, name: str, listener: Callable[..., None], **options: Any) -> None:
    event.listen(target, name, listener, **options)
    stack.callback(event.remove, target, name, listener)
