"""A commit with one new row to flush sends its COMMIT along: a round trip less, in which the table would be locked.

The row is sent and not waited for. At the end of the flush the COMMIT is, and with it the row's answer: what is refused
fails the flush, with which SQLAlchemy has not finished, and so leaves the session as it always does. The commit that
SQLAlchemy then goes on to is over already.

One row, and only where nobody looks on: with several, an error comes after others are taken for stored; and who listens
to a session's flush or to an engine's statements may execute something after what is the end here, or count rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from coord.postgresql.pipelining import PipeliningConnection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection, ExecutionContext
    from sqlalchemy.orm import InstanceState

_IN_COMMIT = "_prepare_impl"
"""The step of `SessionTransaction` that flushes for a commit; see tests/test_flushing.py for what is pinned here."""

_FLUSH = Session.flush
_MAY_HAVE_COMMITTED = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)
_EVENTS = ("commit", "before_execute", "after_execute", "before_cursor_execute", "after_cursor_execute")
"""Of a connection, in which somebody may execute more, or count rows."""


class LastFlush:
    """One that is under way, of one row, on the one connection of its session."""

    def __init__(self, session: Session, connection: Connection, row: InstanceState[Any]) -> None:
        self.session = session
        self._connection = connection
        self._row = row
        self._had = dict(row.dict)
        self._statement: tuple[Any, ...] = (None, None, None)

    def note(self, *statement: Any) -> None:
        """What is about to be executed, with its parameters and SQLAlchemy's context."""
        self._statement = statement

    def end(self) -> None:
        """With the COMMIT, unless there is more to flush."""
        driver: Any = self._connection.connection.driver_connection
        if not driver.is_owed:
            return
        is_all = self._is_all()
        try:
            await_only(driver.commit_early() if is_all else driver.hear())
        except BaseException as error:  # noqa: BLE001 - it is raised
            if isinstance(error, asyncpg.PostgresError) and not isinstance(error, _MAY_HAVE_COMMITTED):
                self._restore()
            self._raise(error)

    def _is_all(self) -> bool:
        """Whether nothing is left, and the row becomes the session's own without a word."""
        row = self._row.obj()
        key = self._row.mapper.identity_key_from_instance(row)
        is_new_key = None not in key[1] and key not in self.session.identity_map
        is_alone = [*self.session.new] == [row] and _is_otherwise_clean(self.session)
        return is_new_key and is_alone and len(_begun(self.session.get_transaction())) == 1

    def _restore(self) -> None:
        """A row that was refused has not what the flush fills in after an INSERT: a default is made anew then.

        Where nobody knows whether it was, it keeps its key: with another one it might be stored twice.
        """
        for key in self._row.dict.keys() - self._had:
            del self._row.dict[key]
        self._row.dict.update(self._had)

    def _raise(self, error: BaseException) -> None:
        """As SQLAlchemy raises what a statement has raised."""
        if isinstance(error, Exception):
            try:
                self._connection.connection.dbapi_connection._handle_exception(error)  # type: ignore[union-attr]
            except Exception as translated:  # noqa: BLE001 - it is what SQLAlchemy raises
                error = translated
        statement, parameters, context = self._statement
        self._connection._handle_dbapi_exception(error, statement, parameters, None, context)


def begin_last_flush(session: Session, *_: Any) -> None:
    """For the `before_flush` event of all sessions."""
    transaction: Any = session.get_transaction()
    if transaction is None or len(session.new) != 1 or not _is_for_commit(session, transaction):
        return
    (row,) = map(inspect, session.new)
    connection = _own_connection(transaction)
    if connection is None or not _is_otherwise_clean(session) or not _is_one_statement(row):
        return
    driver = _driver(connection)
    if driver is not None and driver.is_in_transaction() and _is_unobserved(session, connection, row.mapper):
        driver.last_flush = LastFlush(session, connection, row)


def end_last_flush(session: Session, _context: Any) -> None:
    """For the `after_flush` event of all sessions."""
    transaction: Any = session.get_transaction()
    for connection, *_ in _begun(transaction) if transaction is not None else ():
        driver = _driver(connection)
        if driver is not None and driver.last_flush is not None and driver.last_flush.session is session:
            flush, driver.last_flush = driver.last_flush, None
            flush.end()


def note_statement(cursor: Any, statement: str, parameters: Any, context: ExecutionContext | None) -> None:
    """For the `do_execute` event of an engine, which leaves the rest to SQLAlchemy."""
    driver = cursor._connection
    if getattr(driver, "has_committed", False):
        raise InvalidRequestError("The transaction was committed by its last flush, and something goes on with it.")
    if (flush := getattr(driver, "last_flush", None)) is not None:
        flush.note(statement, parameters, context)


def _is_for_commit(session: Session, transaction: Any) -> bool:
    """Not for a savepoint's release; nor in a `before_commit` listener, which may go on with the transaction."""
    step = getattr(transaction._current_fn, "__name__", "")
    is_last = step == _IN_COMMIT and not session.in_nested_transaction() and not session.dispatch.before_commit
    return is_last and not session.twophase


def _own_connection(transaction: Any) -> Connection | None:
    """The one that the session has made itself, and will commit and close, if it has only that one."""
    begun = _begun(transaction)
    if len(begun) != 1:
        return None
    ((connection, _, _, is_own),) = begun
    return connection if is_own else None


def _begun(transaction: Any) -> set[tuple[Connection, Any, bool, bool]]:
    """On which connections; each is found by itself and by its engine."""
    return set(transaction._connections.values())


def _is_otherwise_clean(session: Session) -> bool:
    """Whether nothing is to be flushed but what is new."""
    return not session.deleted and not session.identity_map.check_modified()


def _is_one_statement(row: InstanceState[Any]) -> bool:
    """No second table's, none of rows between rows, and none for a key that is set later."""
    return len(row.mapper.tables) == 1 and row.dict.keys().isdisjoint(row.mapper.relationships.keys())


def _is_unobserved(session: Session, connection: Connection, mapper: Any) -> bool:
    of_session: Any = session.dispatch
    return (
        type(session).flush is _FLUSH
        and "flush" not in vars(session)
        and not (of_session.after_flush_postexec or of_session.pending_to_persistent)
        and not (mapper.dispatch.before_insert or mapper.dispatch.after_insert)
        and not any(getattr(each.dispatch, name) for each in (connection, connection.engine) for name in _EVENTS)
        and all(each is note_statement for each in connection.dialect.dispatch.do_execute)
        and all(
            _are_ours(getattr(of_session, name)) for name in ("before_flush", "after_flush", "after_transaction_end")
        )
    )


def _are_ours(listeners: Iterable[Any]) -> bool:
    return all((getattr(listener, "__module__", None) or "").partition(".")[0] == "coord" for listener in listeners)


def _driver(connection: Connection) -> Any:
    """None if it does not pipeline."""
    if connection.closed or connection.invalidated:
        return None
    driver = connection.connection.driver_connection
    return driver if issubclass(type(driver), PipeliningConnection) else None  # asyncpg's isinstance() says so of any
