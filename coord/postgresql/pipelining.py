"""Connections of asyncpg on which BEGIN, and an INSERT whose answer can wait, travel with the next statement.

asyncpg waits for each answer before it sends more. Here some messages go out *ahead* and without a Sync: the server
takes them together with the statement that asyncpg sends next, and if one of them fails skips all the rest up to that
statement's Sync ("Pipelining" in the chapter of PostgreSQL's manual on its protocol). So nothing ever runs outside a
transaction that was to be begun, and an error is the next statement's. The answers that asyncpg has not asked for are
taken out of what it is given.

asyncpg knows of a transaction only by what follows a Sync. So only what it has prepared already, and sends with a Sync
of its own, may come after something ahead; before anything else that is answered first, by a query that does nothing.
"""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from functools import lru_cache
from struct import pack
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpg.prepared_stmt import PreparedStatement

INSERTS = 16
"""Statements that a connection keeps for `insert_ahead`: one for each schema that the ledger is used under."""

_BEGIN = re.compile(r"BEGIN[ A-Z]*;")
"""As asyncpg's transactions begin."""
_COMMIT = "COMMIT;"
"""As they commit."""
_NOTHING = ";"
"""A query, and not even that."""
_ANY_TIME = b"NSA"
"""Notices, parameters that have changed and notifications belong to no statement."""


class PipeliningConnection(asyncpg.Connection):  # type: ignore[misc]
    """A `connection_class` of asyncpg's."""

    __slots__ = ("_ahead", "_inserts")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ahead = _Ahead(self._transport, self._protocol)  # pinned by tests/test_pipelining.py
        self._inserts: dict[str, PreparedStatement[Any]] = {}

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """As asyncpg's, whose transactions begin and end by it as well."""
        if query == _COMMIT:
            return await self._commit(timeout)
        if self._ahead.owed and not args:
            await self._heard(query)
        elif not args and self._pipelines and _BEGIN.fullmatch(query):
            self._check_open()
            self._ahead.send(_once(query), _BEGUN)
            return "BEGIN"
        status: str = await super().execute(query, *args, timeout=timeout)
        return status

    async def insert_ahead(self, query: str, *args: Any) -> None:
        """Insert one row, in a transaction; only when this connection does it first is the answer waited for."""
        statement = self._inserts.get(query)
        is_one_too_many = statement is None and len(self._inserts) >= INSERTS
        if not self._pipelines or is_one_too_many or self.get_settings().client_encoding != "UTF8":
            await self.fetch(query, *args)
        elif statement is None:
            statement = await self.prepare(query)
            await statement.fetch(*args)
            self._inserts[query] = statement
        else:
            self._check_open()
            self._ahead.send(_again(statement.get_name(), args), _INSERTED)

    @property
    def _pipelines(self) -> bool:
        """Not while a cancelled query has still to end, and not if somebody hears of each or each is prepared anew."""
        return self._stmt_cache_enabled and not self._query_loggers and not self._protocol._is_cancelling()

    def is_in_transaction(self) -> bool:
        return bool(self._ahead.owed) or super().is_in_transaction()

    async def _executemany(self, *args: Any, **options: Any) -> Any:
        """asyncpg rolls back when it cannot encode a later row in a transaction that it does not know of."""
        await self._heard()
        return await super()._executemany(*args, **options)

    async def reset(self, **options: Any) -> None:
        await self._heard("ROLLBACK")
        await super().reset(**options)

    async def _execute(self, query: str, *args: Any, **options: Any) -> Any:
        await self._heard_unless_prepared(query)
        return await super()._execute(query, *args, **options)

    async def _get_statement(self, query: str, *args: Any, **options: Any) -> Any:
        await self._heard_unless_prepared(query)
        return await super()._get_statement(query, *args, **options)

    async def _heard_unless_prepared(self, query: str) -> None:
        """asyncpg, and SQLAlchemy by it, prepares without a Sync: see above."""
        if not self._ahead.owed:
            return
        if query in (_NOTHING, "COMMIT") or self._stmt_cache.has((query, self._protocol.get_record_class(), False)):
            self._ahead.ask()
        else:
            await self._heard()

    async def copy_from_table(self, *args: Any, **options: Any) -> Any:
        await self._heard()
        return await super().copy_from_table(*args, **options)

    async def copy_from_query(self, *args: Any, **options: Any) -> Any:
        await self._heard()
        return await super().copy_from_query(*args, **options)

    async def copy_to_table(self, *args: Any, **options: Any) -> Any:
        await self._heard()
        return await super().copy_to_table(*args, **options)

    async def copy_records_to_table(self, *args: Any, **options: Any) -> Any:
        await self._heard()
        return await super().copy_records_to_table(*args, **options)

    async def _commit(self, timeout: float | None) -> str:
        """With a Sync of its own if anything is ahead of it, which a simple query has not."""
        if self._ahead.owed:
            try:
                await self.fetch("COMMIT", timeout=timeout)
            except asyncpg.PostgresError:
                await self._abandon()  # what a COMMIT that fails does by itself
                raise
            return "COMMIT"
        if not super().is_in_transaction():
            raise asyncpg.NoActiveSQLTransactionError("cannot commit: the transaction has ended before")
        status: str = await super().execute(_COMMIT, timeout=timeout)
        if status != "COMMIT":
            raise asyncpg.InFailedSQLTransactionError("cannot commit: a statement had failed, and all is rolled back")
        return status

    async def _abandon(self) -> None:
        try:
            await super().execute("ROLLBACK;")
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            self.terminate()

    async def _heard(self, query: str = "") -> None:
        """Have what was sent ahead answered, by what takes no snapshot; its error, unless that is rolled back."""
        try:
            if self._ahead.owed:
                await self.fetch(_NOTHING)
        except asyncpg.PostgresError:
            if not query.startswith("ROLLBACK"):
                raise


class _Ahead(asyncio.Protocol):
    """Stands before asyncpg's protocol as long as the server owes answers to what was sent ahead."""

    def __init__(self, transport: Any, protocol: Any) -> None:
        self._transport = transport
        self._protocol = protocol
        self.owed = b""
        """What it will answer, byte for byte."""
        self._part = b""
        """Of a message, the rest of which is still to come."""
        self._asked = False
        """Whether asyncpg waits for an answer, or will within this step."""
        self._error = b""
        """What has failed, until asyncpg has asked something: before, it takes an error for the connection's end."""

    def send(self, messages: bytes, answers: bytes) -> None:
        if not self.owed:
            self._transport.set_protocol(self)
        self.owed += answers
        self._transport.write(messages)

    def data_received(self, data: bytes) -> None:
        data, self._part = self._part + data, b""
        if not self._error and data.startswith(self.owed):
            self._step_aside(data[len(self.owed) :])
            return
        while len(data) >= 5 and len(data) >= (end := 1 + int.from_bytes(data[1:5])):
            message, data = data[:end], data[end:]
            if message[:1] in _ANY_TIME:
                self._protocol.data_received(message)
            elif message[:1] == b"E" and not self._asked:
                self._error = message
            elif self._error or message[:1] == b"E":
                self._step_aside(self._error + message + data)
                return
            elif not self.owed.startswith(message):
                # Somebody else has used the connection in between; whose answer is whose nobody knows any more.
                self._step_aside(b"")
                self._transport.abort()
                return
            elif message == self.owed:
                self._step_aside(data)
                return
            else:
                self.owed = self.owed[len(message) :]
        self._part = data

    def ask(self) -> None:
        """asyncpg is about to send something, in this step of its task."""
        self._asked = True
        if self._error:
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        if self._error:
            self._step_aside(self._error)

    def _step_aside(self, rest: bytes) -> None:
        self.owed = self._error = b""
        self._asked = False
        self._transport.set_protocol(self._protocol)
        if rest:
            self._protocol.data_received(rest)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self.owed = self._error = b""
        self._protocol.connection_lost(error)


def _message(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return kind + pack("!i", 4 + len(content)) + content


@lru_cache(maxsize=32)
def _once(query: str) -> bytes:
    """By the unnamed statement."""
    return _message(b"P", b"\0", query.encode(), b"\0\0\0") + _again("", ())


def _again(statement: str, values: Sequence[Any]) -> bytes:
    """With its values as text, which is how PostgreSQL takes them where no format is named."""
    bound = [b"\0", statement.encode(), b"\0", pack("!hh", 0, len(values))]
    for value in values:
        if value is None:
            bound.append(pack("!i", -1))
        else:
            text = _text(value).encode()
            bound += (pack("!i", len(text)), text)
    return _message(b"B", *bound, b"\0\0") + _EXECUTE


def _text(value: object) -> str:
    match value:
        case str():
            return value
        case datetime():
            return value.isoformat()
        case bool():
            return "true" if value else "false"
        case int() | float() | UUID():
            return str(value)
    raise TypeError(f"{value!r} is of no type that is known here")


_EXECUTE = _message(b"E", b"\0", pack("!i", 0))
_BOUND = _message(b"2")
_BEGUN = _message(b"1") + _BOUND + _message(b"C", b"BEGIN\0")
_INSERTED = _BOUND + _message(b"C", b"INSERT 0 1\0")
