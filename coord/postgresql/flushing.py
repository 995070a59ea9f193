"""The flush that a commit begins with ends with the COMMIT itself: a round trip less, in which its tables are locked.

The rows that the ORM inserts there, asking nothing back, are sent and not waited for. At the end of the flush the
COMMIT is, and with it their answers: what is refused fails the flush, with which SQLAlchemy has not finished, and so
leaves the session as it always does. The commit that SQLAlchemy then goes on to is over already.

Only where nobody looks on: who listens to a session's flushes, or to an engine's statements, may execute something
after what is the end here, or count the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.util import await_only

from coord.postgresql.pipelining import PipeliningConnection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection, ExecutionContext
    from sqlalchemy.orm import InstanceState, Session

_IN_COMMIT = "_prepare_impl"
"""The step of `SessionTransaction` that flushes for a commit; see tests/test_flushing.py for what is pinned here."""

_EVENTS = ("commit", "before_execute", "after_execute", "before_cursor_execute", "after_cursor_execute")
"""Of a connection, in which somebody may execute more, or count rows."""


class LastFlush:
    """One that is under way, on the one connection of its session."""

    def __init__(self, session: Session, connection: Connection) -> None:
        self.session = session
        self._connection = connection
        states: list[InstanceState[Any]] = [inspect(row) for row in session.new]
        self._had = [(state, frozenset(state.dict)) for state in states]
        self._statement: tuple[Any, ...] = (None, None, None)
        self._rows = 0

    def note(self, *statement: Any) -> None:
        """What is about to be executed, with its parameters and SQLAlchemy's context."""
        self._statement = statement

    def row_ahead(self) -> None:
        """That was a row, and is not waited for."""
        self._rows += 1

    def end(self) -> None:
        """With the COMMIT."""
        driver: Any = self._connection.connection.driver_connection
        if not driver.is_owed:
            return
        try:
            await_only(driver.commit_early())
        except BaseException as error:  # noqa: BLE001 - it is raised
            for state, had in self._had:
                _forget(state, state.dict.keys() - had)
            self._raise(error)

    def _raise(self, error: BaseException) -> None:
        """As SQLAlchemy raises what a statement has raised; of several, nobody knows which it was."""
        statement, parameters, context = self._statement
        if self._rows > 1:
            statement = parameters = None
        if isinstance(error, Exception):
            try:
                self._connection.connection.dbapi_connection._handle_exception(error)  # type: ignore[union-attr]
            except Exception as translated:  # noqa: BLE001 - it is what SQLAlchemy raises
                error = translated
        self._connection._handle_dbapi_exception(error, statement, parameters, None, context)


def begin_last_flush(session: Session, *_: Any) -> None:
    """For the `before_flush` event of all sessions."""
    transaction: Any = session.get_transaction()
    if transaction is None or not session.new or not _is_for_commit(session, transaction):
        return
    if (connection := _own_connection(transaction)) is not None and _is_unobserved(session, connection):
        driver = _driver(connection)
        if driver is not None and driver.is_in_transaction():
            driver.last_flush = LastFlush(session, connection)


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


def _is_unobserved(session: Session, connection: Connection) -> bool:
    events: Any = session.dispatch
    if events.after_flush_postexec or events.pending_to_persistent:
        return False
    if any(getattr(each.dispatch, name) for each in (connection, connection.engine) for name in _EVENTS):
        return False
    mappers = {inspect(row).mapper for row in session.new}
    if any(mapper.dispatch.before_insert or mapper.dispatch.after_insert for mapper in mappers):
        return False
    return _are_ours(events.before_flush) and _are_ours(events.after_flush)


def _are_ours(listeners: Iterable[Any]) -> bool:
    return all(listener.__module__.partition(".")[0] == "coord" for listener in listeners)


def _driver(connection: Connection) -> Any:
    """None if it does not pipeline."""
    if connection.closed or connection.invalidated:
        return None
    driver = connection.connection.driver_connection
    return driver if issubclass(type(driver), PipeliningConnection) else None  # asyncpg's isinstance() says so of any


def _forget(state: InstanceState[Any], keys: Iterable[str]) -> None:
    """What the flush has filled in, which of a row that was refused it would not have."""
    for key in keys:
        del state.dict[key]
