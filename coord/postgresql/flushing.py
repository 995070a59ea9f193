"""The rows of a commit's own flush travel with the COMMIT: a round trip less, in which their table would be locked.

What the ORM inserts when it is told to commit, asking nothing back, it sends and goes on; the COMMIT is then the first
statement that waits for an answer. An error is the commit's, and leaves the session as one of the flush would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from greenlet import getcurrent
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from coord.postgresql.pipelining import PipeliningConnection

if TYPE_CHECKING:
    from sqlalchemy import ExecutionContext
    from sqlalchemy.orm import SessionTransaction


class LastFlush:
    """From `session.commit()` to the COMMIT of the one connection that the session has."""

    def __init__(self, transaction: SessionTransaction) -> None:
        self._transaction = transaction
        self._greenlet = getcurrent()
        self._next: str | None = None
        self.rows = 0
        """How many went ahead."""

    def note(self, statement: str, context: Any) -> None:
        """What is about to be executed may go ahead if the ORM's unit of work sends it: nobody asks how it went.

        Not what comes later because the commit has not come, as an error in a listener has ended it.
        """
        in_flush = context.isinsert and "compiled_cache" in context.execution_options
        self._next = statement if in_flush and getcurrent() is self._greenlet else None

    def has_next(self, statement: str) -> bool:
        """Once."""
        expected, self._next = self._next, None
        return expected == statement

    def undo(self) -> None:
        """Make new again what was new: SQLAlchemy does so when a flush fails, not when a COMMIT does."""
        if self.rows:
            self._transaction._restore_snapshot()  # pinned by tests/test_flushing.py


def begin_last_flush(session: Session) -> None:
    """For the `before_commit` event of sessions that have one engine, and began a transaction on one connection."""
    if not session.new or session.in_nested_transaction() or not _has_one_engine(session):
        return
    transaction: Any = session.get_transaction()
    begun = set(transaction._connections.values())
    if len(begun) != 1:
        return
    ((connection, *_),) = begun
    if not connection.closed and not connection.invalidated:
        driver = connection.connection.driver_connection
        if issubclass(type(driver), PipeliningConnection):  # asyncpg has isinstance() say so of any
            driver.last_flush = LastFlush(transaction)


def _has_one_engine(session: Session) -> bool:
    """Else a second connection may commit although this one's rows are refused."""
    usual = type(session).get_bind is Session.get_bind and not session.binds
    return usual and isinstance(session.bind, Engine) and not session.twophase


def note_statement(cursor: Any, statement: str, _parameters: Any, context: ExecutionContext | None) -> None:
    """For the `do_execute` event of an engine, which leaves it to SQLAlchemy."""
    flush: LastFlush | None = getattr(cursor._connection, "last_flush", None)
    if flush is not None:
        flush.note(statement, context)
