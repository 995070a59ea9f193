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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import Any, ClassVar, Self

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection, DateTime, Integer, Row, column, event, func, select, table, tuple_
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import Session

from coord.cancellation import interruptible
from coord.database.engine import Backend, another, backend_of, dispose, prepare, session_that_uses
from coord.database.pings import Pings
from coord.database.transaction import connections_in_use
from coord.errors import message_of

Sent = tuple[float, Connection, tuple[Any, ...]]
"""When something was sent, on the monotonic clock, by which connection, and what: a statement and its values."""

logger = logging.getLogger("coord.engine")

ANSWER_SECONDS = 4.0
"""By which an answer is late, or the last part of one that no buffer had room for, before it counts as lost."""
BYTES_PER_SECOND = 250_000
"""That the slowest link carries: PostgreSQL does nothing before it has been sent all of a statement's values."""
INTERVAL_SECONDS = 0.5
LOOK_SECONDS = 1.5
"""For PostgreSQL to accept a connection and to say what its backends do."""
TERMINATE_MILLISECONDS = 500
"""For a backend to end that does nothing."""
HELD_UP_SECONDS = 2.5
"""Between two rounds, after which the event loop has been held up: it may not have read what has come."""
IDLE_STATES = {"idle", "idle in transaction", "idle in transaction (aborted)"}
"""In which a backend has answered everything. What a role may not see has no state."""
HALFWAY = ("active", "ClientRead")
"""State and wait event of one that has been sent a part of what makes a statement."""

_activity = table(
    "pg_stat_activity",
    column("pid", Integer),
    column("backend_start", DateTime(timezone=True)),
    column("state"),
    column("state_change"),
    column("wait_event"),
    schema="pg_catalog",
)
_own, _server_started = func.pg_backend_pid(), func.pg_postmaster_start_time()
_idle_seconds = func.extract("epoch", func.clock_timestamp() - _activity.c.state_change).label("idle_seconds")
_what = (
    _own.label("own"),
    _server_started.label("server_started"),
    *_activity.c["pid", "backend_start", "state", "state_change", "wait_event"],
    _idle_seconds,
)
_ended = func.pg_terminate_backend(_activity.c.pid, TERMINATE_MILLISECONDS)


class LostAnswers:
    """Closes connections of an engine within the block whose answers were lost, some five seconds after that.

    Connects only while an answer is late. The backends are ended first, which frees their locks. Behind a pooler, which
    does not say whose backend is whose, nothing is done. Watched are statements, what a pool asks before it gives a
    connection out, and the COMMIT of sessions that have one connection: of several, nobody is told which one a session
    that commits waits for.

    An answer is waited for until the greenlet in which it was asked for ends, since SQLAlchemy makes one for each call,
    or sends something else, by whichever engine. An engine that is told when statements end has, for each
    transaction, an eighth more of Python's calls to make.
    """

    _sent: ClassVar[dict[greenlet, Sent]] = {}
    """What each greenlet has sent last; some have ended by now. One for all, since a session may have several engines:
    while it waits for one of them, what it has of the others does nothing."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._watched = engine
        self._engine = another(engine)
        self._calm_since = 0.0
        self._is_connected = False
        self._halfway: dict[int, object] = {}
        """Which backends waited for the rest of a statement at the last look, and when they had got the first part."""
        self._pings = Pings()
        statements = ("do_execute", "do_executemany", "do_execute_no_params")
        self._listeners: list[tuple[Any, str, Callable[..., None]]] = [
            *((engine.sync_engine, name, self._on_statement) for name in statements),
            (engine.sync_engine, "checkin", self._pings.on_checkin),
            (engine.sync_engine, "checkout", self._pings.on_checkout),
            (Session, "before_commit", self._on_commit),
        ]

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        prepare(self._watched)
        for target, name, listener in self._listeners:
            event.listen(target, name, listener, insert=True)  # before what an application does then
        self._task = asyncio.create_task(self._run(), name="coord lost answers")
        return self

    async def __aexit__(self, *_: object) -> None:
        for target, name, listener in self._listeners:
            event.remove(target, name, listener)
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._disconnect()
        for sender, _ in self._mine():
            del self._sent[sender]

    def _on_statement(self, *arguments: Any) -> None:
        context: ExecutionContext = arguments[-1]
        self._on_sent(context.root_connection, arguments[1:-1])

    def _on_commit(self, session: Session) -> None:
        """COMMIT is sent when all is flushed."""
        connections = [*connections_in_use(session)]
        if len(connections) == 1 and connections[0].dialect is self._watched.dialect:
            self._on_sent(connections[0], ())

    def _on_sent(self, connection: Connection, what: tuple[Any, ...]) -> None:
        if asyncio.get_running_loop() is self._loop:
            self._sent[getcurrent()] = monotonic(), connection, what

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
                logger.debug("PostgreSQL does not say whose answers are lost: %s", message_of(error))

    async def _round(self) -> None:
        late = monotonic() - ANSWER_SECONDS
        suspects = [*self._suspects(late)]
        if suspects and self._calm_since < late:
            self._is_connected = True
            await interruptible(self._look(suspects), limit=LOOK_SECONDS)
        elif self._is_connected and not suspects:
            await self._disconnect()

    def _suspects(self, late: float) -> Iterator[Suspect]:
        """Where an answer has been waited for since before that; what nobody waits for any more is forgotten."""
        for sender, sent in self._mine():
            since, connection, what = sent
            if not _is_awaited(sender, sent):
                del self._sent[sender]
            elif since < late:
                waits = partial(self._waits, sender, sent)
                yield Suspect(_driver(connection), backend_of(connection), waits, since, what)
        for ping in self._pings.look():
            if ping.seen_at < late:
                waits = partial(self._pings.is_under_way, ping)
                yield Suspect(ping.driver, backend_of(ping.entry), waits, ping.seen_at, ())

    def _mine(self) -> list[tuple[greenlet, Sent]]:
        """What was sent by way of the engine that is watched."""
        return [(sender, sent) for sender, sent in [*self._sent.items()] if sent[1].dialect is self._watched.dialect]

    async def _look(self, suspects: Sequence[Suspect]) -> None:
        which = _activity.c.pid.in_([_own, *(suspect.pid for suspect in suspects)])
        async with self._engine.begin() as connection:
            rows = (await connection.execute(select(*_what).where(which))).all()
            driver = await connection.run_sync(_driver)
            if rows[0].own != driver.get_server_pid():
                return  # a pooler is between
            found = {row.pid: row for row in rows}
            server_started, stuck = rows[0].server_started, self._stuck(rows)
            lost = [
                suspect
                for suspect in suspects
                if suspect.is_lost(server_started, found.get(suspect.pid), stuck) and suspect.waits()
            ]
            if lost:
                await _end(connection, lost)
            for suspect in lost:
                if suspect.waits():
                    logger.warning("An answer of PostgreSQL was lost, and its connection is closed")
                    suspect.driver.terminate()

    def _stuck(self, rows: Sequence[Row[Any]]) -> set[int]:
        """Backends that wait for the rest of a statement, and did so at the last look.

        Of a new one asyncpg sends the values when it is parsed, which may wait for its table's lock.
        """
        halfway = {row.pid: row.state_change for row in rows if (row.state, row.wait_event) == HALFWAY}
        before, self._halfway = self._halfway, halfway
        return {pid for pid, since in halfway.items() if before.get(pid) == since}

    async def _disconnect(self) -> None:
        self._is_connected = False
        await dispose(self._engine, LOOK_SECONDS)

    def _waits(self, sender: greenlet, sent: Sent) -> bool:
        """Whether it still waits for that answer."""
        return self._sent.get(sender) is sent and _is_awaited(sender, sent)


class Suspect:
    """A connection on which an answer is late; `waits` says whether it still is waited for."""

    def __init__(
        self, driver: Any, backend: Backend | None, waits: Callable[[], bool], since: float, what: tuple[Any, ...]
    ) -> None:
        self.driver = driver
        self.pid: int = driver.get_server_pid()
        self.backend = backend
        self.waits = waits
        self._since = since
        self._what = what

    def is_lost(self, server_started: object, row: Row[Any] | None, stuck: set[int]) -> bool:
        """Whether the server that was asked is its own, where its backend is gone or has done nothing for long."""
        if self.backend is None or self.backend.server_started != server_started:
            return False
        # Of another role's backend nothing may be seen, but that it is there.
        if row is None or row.backend_start not in (None, self.backend.started):
            return True
        does_nothing = row.state in IDLE_STATES or row.pid in stuck
        # Before that a slow link may still be carrying it.
        has_arrived = monotonic() - self._since >= ANSWER_SECONDS + _size(self._what) / BYTES_PER_SECOND
        return does_nothing and has_arrived and bool(row.idle_seconds >= ANSWER_SECONDS)


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


def _is_awaited(sender: greenlet, sent: Sent) -> bool:
    """What SQLAlchemy asks the first connection of all is in no transaction, and nobody's to watch."""
    connection = sent[1]
    if sender.dead or connection.closed or connection.invalidated or not connection.in_transaction():
        return False
    # A session that sends COMMIT by one connection after the other does not say by which just now.
    session = session_that_uses(connection)
    return session is None or session.is_active or len(connections_in_use(session)) <= 1


def _size(what: Any) -> int:
    """Of what is sent, about: all that may be large is a text, bytes, or many of them."""
    match what:
        case str() | bytes() | bytearray() | memoryview():
            return len(what)
        case list() | tuple() | set():
            return sum(map(_size, what))
    return 0
