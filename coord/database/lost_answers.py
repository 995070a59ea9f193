"""Answers that were lost on their way: PostgreSQL is asked by another connection, and the one that waits is closed.

Where packets vanish and neither end is told, a driver waits for an answer as long as its operating system does: for a
quarter of an hour, or two. Meanwhile PostgreSQL has answered, or never was asked, and keeps the transaction's locks.
What a statement takes says nothing: it may wait for a lock. But PostgreSQL says of each backend since when it does
nothing (`pg_stat_activity`, section 27.2.3 of its manual). One that has done nothing for seconds, while as long an
answer is waited for on its connection, has answered or will never do so. Closed, the connection is lost as any other:
whoever waits is told so, and the pool gives up all that are as old.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Self

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection, DateTime, Integer, Row, column, event, func, select, table, tuple_
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import Session

from coord.cancellation import interruptible
from coord.database.engine import another, backend_of, note_backends
from coord.database.transaction import connections_in_use

Sent = tuple[float, greenlet]
"""When something was sent, on the monotonic clock, and in which greenlet."""

logger = logging.getLogger("coord.engine")

ANSWER_SECONDS = 4.0
"""By which an answer is late, or the last part of one that no buffer had room for, before it counts as lost."""
INTERVAL_SECONDS = 0.5
LOOK_SECONDS = 1.5
"""For PostgreSQL to accept a connection and to say what its backends do."""
TERMINATE_MILLISECONDS = 500
"""For a backend to end that does nothing."""
HELD_UP_SECONDS = 2.5
"""Between two rounds, after which the event loop has been held up: it may not have read what has come."""
IDLE_STATES = {"idle", "idle in transaction", "idle in transaction (aborted)"}
"""In which a backend has answered everything. What a role may not see has no state."""

_activity = table(
    "pg_stat_activity",
    column("pid", Integer),
    column("backend_start", DateTime(timezone=True)),
    column("state"),
    column("state_change"),
    schema="pg_catalog",
)
_own, _server_started = func.pg_backend_pid(), func.pg_postmaster_start_time()
_idle_seconds = func.extract("epoch", func.clock_timestamp() - _activity.c.state_change).label("idle_seconds")
_what = (
    _own.label("own"),
    _server_started.label("server_started"),
    *_activity.c["pid", "backend_start", "state"],
    _idle_seconds,
)
_ended = func.pg_terminate_backend(_activity.c.pid, TERMINATE_MILLISECONDS)


class LostAnswers:
    """Closes connections of an engine within the block whose answers were lost, some five seconds after that.

    Connects only while an answer is late. The backends are ended first, which frees their locks. Behind a pooler, which
    does not say whose backend is whose, nothing is done. Watched are statements, and the COMMIT of sessions.

    An answer is waited for until the greenlet ends in which it was asked for, since SQLAlchemy makes one for each call.
    An engine that is told when statements end has, for each transaction, an eighth more of Python's calls to make.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._watched = engine
        self._engine = another(engine)
        self._sent: dict[Connection, Sent] = {}
        """The answers that are waited for; or were, if the connection is closed or the greenlet has ended by now."""
        self._calm_since = 0.0
        self._is_connected = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        statements = ("do_execute", "do_executemany", "do_execute_no_params")
        self._listeners: list[tuple[Any, str, Callable[..., None]]] = [
            *((engine.sync_engine, name, self._on_statement) for name in statements),
            (Session, "before_commit", self._on_commit),
        ]

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        note_backends(self._watched)
        for target, name, listener in self._listeners:
            event.listen(target, name, listener)
        self._task = asyncio.create_task(self._run(), name="coord lost answers")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        for target, name, listener in self._listeners:
            event.remove(target, name, listener)
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._disconnect()
        self._sent.clear()

    def _on_statement(self, *arguments: Any) -> None:
        context: ExecutionContext = arguments[-1]
        self._on_sent(context.root_connection)

    def _on_commit(self, session: Session) -> None:
        """COMMIT is sent when all is flushed."""
        for connection in connections_in_use(session):
            if connection.dialect is self._watched.dialect:
                self._on_sent(connection)

    def _on_sent(self, connection: Connection) -> None:
        if asyncio.get_running_loop() is self._loop:
            self._sent[connection] = monotonic(), getcurrent()

    async def _run(self) -> None:
        last = monotonic()
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            last, before = monotonic(), last
            if last - before > HELD_UP_SECONDS:
                self._calm_since = last
            try:
                await self._round()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next round is tried
                logger.debug("PostgreSQL does not say whose answers are lost: %s", str(error) or type(error).__name__)

    async def _round(self) -> None:
        late = monotonic() - ANSWER_SECONDS
        self._sent = {connection: sent for connection, sent in self._sent.items() if _is_awaited(connection, sent)}
        suspects = [Suspect(connection, sent) for connection, sent in self._sent.items() if sent[0] < late]
        if suspects and self._calm_since < late:
            self._is_connected = True
            await interruptible(self._look(suspects), limit=LOOK_SECONDS)
        elif self._is_connected and not suspects:
            await self._disconnect()

    async def _look(self, suspects: Sequence[Suspect]) -> None:
        which = _activity.c.pid.in_([_own, *(suspect.pid for suspect in suspects)])
        async with self._engine.begin() as connection:
            rows = (await connection.execute(select(*_what).where(which))).all()
            driver = await connection.run_sync(_driver)
            if rows[0].own != driver.get_server_pid():
                return  # a pooler is between
            found = {row.pid: row for row in rows}
            server_started = rows[0].server_started
            lost = [
                suspect
                for suspect in suspects
                if suspect.is_lost(server_started, found.get(suspect.pid)) and self._waits(suspect)
            ]
            if lost:
                await _end(connection, lost)
            for suspect in filter(self._waits, lost):
                logger.warning("An answer of PostgreSQL was lost, and its connection is closed")
                suspect.driver.terminate()

    async def _disconnect(self) -> None:
        """The connection may be dead as well."""
        self._is_connected = False
        with suppress(TimeoutError):
            await interruptible(self._engine.dispose(), limit=LOOK_SECONDS)

    def _waits(self, suspect: Suspect) -> bool:
        """Whether it still waits for that answer."""
        sent = suspect.sent
        return self._sent.get(suspect.connection) == sent and _is_awaited(suspect.connection, sent)


class Suspect:
    """A connection on which an answer is late."""

    def __init__(self, connection: Connection, sent: Sent) -> None:
        self.connection = connection
        self.sent = sent
        self.driver = _driver(connection)
        self.pid: int = self.driver.get_server_pid()
        self.backend = backend_of(connection)

    def is_lost(self, server_started: object, row: Row[Any] | None) -> bool:
        """Whether the server that was asked is its own, where its backend is gone or has done nothing for long."""
        if self.backend is None or self.backend.server_started != server_started:
            return False
        # Of another role's backend nothing may be seen, but that it is there.
        if row is None or row.backend_start not in (None, self.backend.started):
            return True
        return row.state in IDLE_STATES and bool(row.idle_seconds >= ANSWER_SECONDS)


async def _end(connection: AsyncConnection, suspects: Sequence[Suspect]) -> None:
    """A role may end its own backends (`pg_terminate_backend`, section 9.28.2 of PostgreSQL's manual)."""
    backends = [(suspect.pid, suspect.backend.started) for suspect in suspects if suspect.backend is not None]
    which = tuple_(_activity.c.pid, _activity.c.backend_start).in_(backends)
    try:
        async with connection.begin_nested():
            await connection.execute(select(_ended).where(which))
    except DBAPIError as error:
        logger.warning("Backends whose clients were cut off cannot be ended: %s", error.orig)


def _driver(connection: Connection) -> Any:
    """asyncpg's own connection."""
    return connection.connection.driver_connection


def _is_awaited(connection: Connection, sent: Sent) -> bool:
    """What SQLAlchemy asks the first connection of all is in no transaction, and nobody's to watch."""
    is_open = not connection.closed and not connection.invalidated and connection.in_transaction()
    return is_open and not sent[1].dead
