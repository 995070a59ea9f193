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

import re
from typing import TYPE_CHECKING, Any

import asyncpg
from asyncpg.connresource import guarded
from asyncpg.prepared_stmt import PreparedStatement

from coord.postgresql.ahead import Ahead
from coord.postgresql.encoding import Encoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coord.postgresql.flushing import LastFlush

INSERTS = 16
"""Statements that a connection keeps for `insert_ahead`: one for each schema that the ledger is used under."""

_BEGIN = re.compile(r"BEGIN[ A-Z]*;")
"""As asyncpg's transactions begin."""
_COMMIT = "COMMIT;"
"""As they commit."""
_NOTHING = ";"
"""A query, and not even that."""
_CAST = r'(?:::[\w ".\[\]]+(?:\([\d, ]+\)[\w ]*)?)?'
_ROW_ALONE = re.compile(rf'INSERT INTO (?:[\w"]+\.)?[\w"]+ \([^()]+\) VALUES \((?:\$\d+{_CAST}, )*\$\d+{_CAST}\)')
"""As SQLAlchemy writes a row that it asks nothing back of."""


class PipeliningConnection(asyncpg.Connection):  # type: ignore[misc]
    """A `connection_class` of asyncpg's."""

    __slots__ = ("_ahead", "_encoder", "_inserts", "has_committed", "last_flush")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ahead = Ahead(self._transport, self._protocol)  # pinned by tests/test_pipelining.py
        self._encoder = Encoder()
        self._inserts: dict[str, PreparedStatement[Any]] = {}
        self.last_flush: LastFlush | None = None
        """The one that a commit has begun with, while it is under way."""
        self.has_committed = False
        """Whether such a flush has, and the commit is still to come."""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """As asyncpg's, whose transactions begin and end by it as well."""
        is_over, self.has_committed, self.last_flush = self.has_committed, False, None
        if query == _COMMIT:
            return "COMMIT" if is_over else await self._commit(timeout)
        if self._ahead.owed and not args:
            await self._heard(query)
        elif not args and self._pipelines and _BEGIN.fullmatch(query):
            self._check_open()
            self._ahead.begin(query)
            return "BEGIN"
        status: str = await super().execute(query, *args, timeout=timeout)
        return status

    async def insert_ahead(self, query: str, *args: Any) -> None:
        """Insert one row, in a transaction; only when this connection does it first is the answer waited for."""
        statement = self._inserts.get(query)
        is_one_too_many = statement is None and len(self._inserts) >= INSERTS
        if not self._pipelines or is_one_too_many:
            await self.fetch(query, *args)
        elif statement is None:
            statement = await self.prepare(query)
            await statement.fetch(*args)
            self._inserts[query] = statement
        else:
            self._check_open()
            self._ahead.insert(self._encoder.run(statement, args))

    async def prepare(self, query: str, **options: Any) -> PreparedStatement[Any]:
        statement = await super().prepare(query, **options)
        return RowStatement(self, query, statement._state) if _ROW_ALONE.fullmatch(query) else statement

    def row_ahead(self, statement: RowStatement, values: Sequence[Any]) -> bool:
        """Send it now, and have its answer taken by what comes next, if that is a last flush."""
        if self.last_flush is None or not self._pipelines:
            return False
        self._ahead.insert(self._encoder.run(statement, values), may_vary=True)
        return True

    async def commit_early(self) -> None:
        """Before whoever is to do it; errors leave the transaction to be rolled back, if it is not."""
        await self.fetch("COMMIT")
        self.has_committed = True

    async def hear(self) -> None:
        """Wait for what was sent ahead; its error."""
        await self._heard()

    @property
    def is_owed(self) -> bool:
        """Whether something ahead is unanswered."""
        return bool(self._ahead.owed)

    @property
    def failures(self) -> int:
        """How often something that went ahead has failed."""
        return self._ahead.failures

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


class RowStatement(PreparedStatement):  # type: ignore[misc]
    """An INSERT of one row. Goes ahead only once it was answered well, and nothing has failed since."""

    __slots__ = ("_answered_at",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._answered_at = -1
        """How much had failed on its connection when it was last answered well."""

    @guarded  # type: ignore[untyped-decorator]
    async def fetch(self, *args: Any, **options: Any) -> list[Any]:
        connection: PipeliningConnection = self._connection
        if self._answered_at == connection.failures and not options and connection.row_ahead(self, args):
            self._last_status = b"INSERT 0 1"  # type: ignore[misc]
            return []
        rows: list[Any] = await super().fetch(*args, **options)
        self._answered_at = connection.failures
        return rows
