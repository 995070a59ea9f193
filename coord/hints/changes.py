"""Which rows a session's transaction has changed, told once the outermost commit is done and never otherwise."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, Session

from coord.target import column_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy.engine import Dialect
    from sqlalchemy.orm import InstanceState, Mapper, SessionTransaction, UOWTransaction

    from coord.jobs.ledger import Job
    from coord.target import Key

    Change = tuple[Mapper[Any], Key | None]
    """A row by its key, or with None any row of the table."""
    Changed = Mapping[Change, Job | None]
    """What has changed, and if that is the row of a job to be handed to a worker, the job."""
    Tell = Callable[[Session, Changed], None]

_CHANGES = "coord.changes"
_observed: Counter[Dialect] = Counter()
"""How often sessions are listened to, by their engine's dialect: each engine has its own."""


class Changes:
    """Collects the changes of every session whose engine has this dialect, whichever maker made it.

    Rows that the ORM flushes count one by one, its bulk statements by table; raw SQL is announced with `add`.
    """

    def __init__(self, dialect: Dialect, tell: Tell) -> None:
        self._dialect = dialect
        self._tell = tell

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Listen on SQLAlchemy's `Session` until the block ends."""
        listeners: dict[str, Callable[..., None]] = {
            "after_flush": self._after_flush,
            "do_orm_execute": self._do_orm_execute,
            "after_commit": self._after_commit,
            "after_soft_rollback": self._after_soft_rollback,
            "after_transaction_end": self._after_transaction_end,
        }
        for name, listener in listeners.items():
            event.listen(Session, name, listener)
        _observed[self._dialect] += 1
        try:
            yield
        finally:
            _observed[self._dialect] -= 1
            if not _observed[self._dialect]:
                del _observed[self._dialect]
            for name, listener in listeners.items():
                event.remove(Session, name, listener)

    def add(self, session: Session, change: Change) -> None:
        """Tell of the change after the commit; at once when no transaction is open."""
        if session.in_transaction():
            _changes(session)[change] = None
        else:
            self._tell(session, {change: None})

    def _is_ours(self, session: Session) -> bool:
        return session.bind is not None and session.bind.dialect is self._dialect

    def _after_flush(self, session: Session, context: UOWTransaction) -> None:
        """Reads what was flushed where SQLAlchemy keeps it: the sets that a session makes of it cost thrice as much."""
        if not self._is_ours(session):
            return
        changes = _changes(session)
        for state, (is_deleted, only_listed) in context.states.items():  # pinned by tests/test_changes.py
            mapper = state.manager.mapper
            if state.key is not None:
                if is_deleted or _has_changed(state):
                    changes[mapper, state.key[1]] = None  # its key before the flush: nobody waits for one to come
            elif not only_listed:
                changes[mapper, tuple(mapper.primary_key_from_instance(state.obj()))] = None

    def _do_orm_execute(self, state: ORMExecuteState) -> None:
        if state.is_select or not self._is_ours(state.session):
            return
        if state.is_update or state.is_delete or state.is_insert:
            for mapper in state.all_mappers:
                _changes(state.session)[mapper, None] = None

    def _after_commit(self, session: Session) -> None:
        """SQLAlchemy says so at a savepoint's release as well."""
        if session.in_nested_transaction() or not self._is_ours(session):
            return
        changes: dict[Change, Job | None] = {}
        for kept in session.info.pop(_CHANGES, {}).values():
            changes |= kept
        if changes:
            self._tell(session, changes)

    def _after_soft_rollback(self, session: Session, rolled_back: SessionTransaction) -> None:
        if rolled_back.parent is None:
            session.info.pop(_CHANGES, None)
            return
        changes: dict[SessionTransaction | None, Any] = session.info.get(_CHANGES, {})
        for savepoint in [*changes]:
            if rolled_back in _with_parents(savepoint):
                del changes[savepoint]

    def _after_transaction_end(self, session: Session, ended: SessionTransaction) -> None:
        """Closing a session ends its transaction without a rollback of its own."""
        if ended.parent is None:
            session.info.pop(_CHANGES, None)


def collect(session: Session, change: Change, job: Job | None = None) -> None:
    """Have it told after the outermost commit, if this process has a `Coordinator`; else there is nobody to tell."""
    if session.bind is not None and session.bind.dialect in _observed:
        _changes(session)[change] = job


def _changes(session: Session) -> dict[Change, Job | None]:
    """Those of the innermost savepoint, or of the transaction outside any."""
    nested = session.get_nested_transaction()
    kept: dict[Change, Job | None] = session.info.setdefault(_CHANGES, {}).setdefault(nested, {})
    return kept


def _has_changed(state: InstanceState[Any]) -> bool:
    """Whether a column was set, be it to the value it had: to ask for that would cost more than a look at the row."""
    return not state.committed_state.keys().isdisjoint(column_names(state.manager.mapper))


def _with_parents(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent
