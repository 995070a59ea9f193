"""Which rows a session's transaction has changed, told once the outermost commit is done and never otherwise."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, inspect
from sqlalchemy.orm import ORMExecuteState, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy.engine import Dialect
    from sqlalchemy.orm import Mapper, SessionTransaction

    from coord.jobs.ledger import Job
    from coord.target import Key

    Change = tuple[Mapper[Any], Key | None]
    """A row by its key, or with None any row of the table."""
    Changed = Mapping[Change, Job | None]
    """What has changed, and of a job's row whether that is to be handed to a worker."""
    Tell = Callable[[Session, Changed], None]

_CHANGES = "coord.changes"


def collect(session: Session, change: Change, job: Job | None = None) -> None:
    """Have it told after the outermost commit, if this process has a `Coordinator` by then.

    It belongs to the innermost savepoint or transaction; none has begun when its first statement is announced.
    """
    changes: dict[SessionTransaction | None, dict[Change, Job | None]] = session.info.setdefault(_CHANGES, {})
    eldest = next(iter(changes), None)
    if eldest is not None and [*_with_parents(eldest)][-1] is not session.get_transaction():
        changes.clear()  # of a transaction that has ended while nobody was there to be told
    changes.setdefault(session.get_nested_transaction() or session.get_transaction(), {})[change] = job


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
        try:
            yield
        finally:
            for name, listener in listeners.items():
                event.remove(Session, name, listener)

    def add(self, session: Session, change: Change) -> None:
        """Tell of the change after the commit; at once when no transaction is open."""
        if session.in_transaction():
            collect(session, change)
        else:
            self._tell(session, {change: None})

    def _is_ours(self, session: Session) -> bool:
        return session.bind is not None and session.bind.dialect is self._dialect

    def _after_flush(self, session: Session, _context: object) -> None:
        if not self._is_ours(session):
            return
        changed = [row for row in session.dirty if session.is_modified(row, include_collections=False)]
        for row in (*session.new, *changed, *session.deleted):
            mapper: Mapper[Any] = inspect(row).mapper
            collect(session, (mapper, tuple(mapper.primary_key_from_instance(row))))

    def _do_orm_execute(self, state: ORMExecuteState) -> None:
        if (state.is_update or state.is_delete or state.is_insert) and self._is_ours(state.session):
            for mapper in state.all_mappers:
                collect(state.session, (mapper, None))

    def _after_commit(self, session: Session) -> None:
        """SQLAlchemy says so at a savepoint's release as well."""
        if session.in_nested_transaction() or not self._is_ours(session):
            return
        if changes := session.info.pop(_CHANGES, None):
            self._tell(session, {change: job for changed in changes.values() for change, job in changed.items()})

    def _after_soft_rollback(self, session: Session, rolled_back: SessionTransaction) -> None:
        changes: dict[SessionTransaction | None, Any] = session.info.get(_CHANGES, {})
        for transaction in [*changes]:
            if rolled_back in _with_parents(transaction):
                del changes[transaction]

    def _after_transaction_end(self, session: Session, ended: SessionTransaction) -> None:
        """Closing a session ends its transaction without a rollback of its own."""
        if ended.parent is None:
            session.info.pop(_CHANGES, None)


def _with_parents(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent
