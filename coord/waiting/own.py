"""What the caller's own session reads: through its connection, in its context, under its schemas."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from sqlalchemy import inspect, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, undefer

from coord.cancellation import interruptible, uninterrupted
from coord.database.engine import own_connection, written
from coord.database.schemas import schemas_of
from coord.database.target import EAGER, M
from coord.database.transaction import connection_mutex, end_transaction
from coord.errors import RowNotFoundError
from coord.waiting.job_wait import job_target
from coord.waiting.reader import READ_TIMEOUT_SECONDS
from coord.waiting.statements import entity_with_identity, options_of, parameters_of
from coord.waiting.stored import comparisons_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.orm import InstanceState, Mapper

    from coord.database.schemas import Schemas
    from coord.database.target import Target
    from coord.jobs.model import Job
    from coord.waiting.settings import Settings

T = TypeVar("T")

_SET = text("SELECT set_config(:name, :value, true)")
_TIMEOUT = text("SELECT current_setting('statement_timeout')")


class OwnRow(NamedTuple, Generic[M]):
    """The row and the job as one read has found them."""

    row: M | None
    """Detached, with every column loaded and no relationship."""
    identity: tuple[Any, ...] | None
    """Where PostgreSQL keeps it, if `identified`."""
    job: Job | None


class OwnReader(Generic[M]):
    """Reads one row for the session that waits for it.

    In the transaction that the session is in, if that was left open, else in one that it begins by itself and that is
    ended afterwards: its connection is free between two reads. Of a session that is bound to one connection no read is
    ever cancelled, and its end is awaited, so that nothing runs there when the wait is over.
    """

    __slots__ = ("_bound", "_own_reads", "_schemas", "_settings", "_unguarded", "session", "target")

    def __init__(
        self,
        session: AsyncSession,
        target: Target[M],
        schemas: Schemas,
        settings: Settings | None,
        own_reads: asyncio.Semaphore,
    ) -> None:
        self.session = session
        self.target = target
        self._schemas = schemas
        self._settings = settings or ()
        self._own_reads = own_reads
        self._bound = own_connection(session) is not None
        self._unguarded = False
        """Whether a table lock can no longer make a read on the bound connection wait."""

    @property
    def shares_errors(self) -> bool:
        """Whether a failed read leaves the caller's own transaction aborted."""
        return self._unguarded if self._bound else self.session.in_transaction()

    async def read(self, *, identified: bool, job_id: UUID | None, limit: float) -> OwnRow[M]:
        """The job first, so that the row is as the job has left it. `TimeoutError` after `limit` seconds."""

        async def work() -> OwnRow[M]:
            async with self.connection() as connection:
                if not self._bound or self._unguarded:
                    return await self._read(connection, identified, job_id)
                async with _limited(connection, min(limit, READ_TIMEOUT_SECONDS)):
                    found = await self._read(connection, identified, job_id)
                self._unguarded = True  # this transaction now has a lock on the table that keeps others' away
                return found

        return await self._bounded(work(), limit)

    async def stores(self, seen: Mapping[str, Any], *, limit: float) -> bool:
        """Whether these values, stored in the row's columns, are what is there."""

        async def work() -> bool:
            async with self.connection() as connection, connection.begin_nested():
                options = await connection.run_sync(partial(options_of, self.target.mapper))
                for statement, parameters in comparisons_of(self.target, self._schemas, seen):
                    if not await connection.scalar(statement, parameters, execution_options=options):
                        return False
            return True

        return await self._bounded(work(), limit)

    async def refreshed(self, own: M | None, *, limit: float) -> M:
        """The session's own instance, as after its `refresh`, but for what has changes that are not flushed."""

        async def work() -> M:
            async with self.connection():
                with self.session.no_autoflush:
                    if own is not None:
                        await self.session.refresh(own, _unmodified(inspect(own)))
                        return own
                    found = await self.session.get(self.target.mapper.class_, self.target.key, options=[undefer("*")])
            if found is None:
                raise RowNotFoundError(f"{self.target} was deleted")
            return found

        try:
            return await self._bounded(work(), limit)
        except InvalidRequestError as error:
            if own is not None and "Could not refresh" in str(error):
                raise RowNotFoundError(f"{self.target} was deleted") from error
            raise

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """The session's, in its transaction; where it has none, as long as this lasts."""
        session = self.session
        if (own := own_connection(session)) is not None:
            yield own
            return
        bind_arguments = dict(written(self.target.mapper))
        if session.in_transaction():
            yield await session.connection(bind_arguments=bind_arguments)
            return
        translated = self._schemas and self._schemas != schemas_of(session.sync_session)
        options = {"schema_translate_map": dict(self._schemas)} if translated else None
        async with self._own_reads:
            try:
                connection = await session.connection(bind_arguments=bind_arguments, execution_options=options)
                for name, value in self._settings:
                    await connection.execute(_SET, {"name": name, "value": value})
                yield connection
            finally:
                await end_transaction(session)

    async def _read(self, connection: AsyncConnection, identified: bool, job_id: UUID | None) -> OwnRow[M]:
        session = AsyncSession(
            connection,
            sync_session_class=_on_its_bind(type(self.session.sync_session)),  # type: ignore[arg-type]
            join_transaction_mode="rollback_only",
            autoflush=False,
            info={name: value for name, value in self.session.info.items() if not str(name).startswith("coord.")},
        )
        own, given = vars(session.sync_session), vars(self.session.sync_session)
        own.update({name: value for name, value in given.items() if name not in own})
        return await session.run_sync(self._found, identified, job_id)

    def _found(self, session: Session, identified: bool, job_id: UUID | None) -> OwnRow[M]:
        with session:
            job = None if job_id is None else _one(session, job_target(job_id), self._schemas, identified=False)
            row = _one(session, self.target, self._schemas, identified=identified)
            return OwnRow(row and row[1], row and tuple(row[2:]), job and job[1])

    async def _bounded(self, work: Coroutine[Any, Any, T], limit: float) -> T:
        if not self._bound:
            return await interruptible(work, limit=limit)

        async def exclusively() -> T:
            async with connection_mutex(self.session):
                return await work

        return await uninterrupted(exclusively())


@lru_cache(maxsize=256)
def _on_its_bind(session_class: type[Session]) -> type[Session]:
    """With the class's hooks, but with no constructor and no `get_bind` of its own: a connection was chosen."""
    own = {"__init__": Session.__init__, "get_bind": lambda session, *_, **__: session.bind}
    return type(session_class.__name__, (session_class,), own)


def _one(session: Session, target: Target[Any], schemas: Schemas, *, identified: bool) -> Any:
    statement = entity_with_identity(target.mapper, schemas, identified=identified)
    parameters = parameters_of(target.mapper, [target.key], one=True)
    options = options_of(target.mapper, session.connection())
    return session.execute(statement, parameters, execution_options=options).one_or_none()


@asynccontextmanager
async def _limited(connection: AsyncConnection, limit: float) -> AsyncIterator[None]:
    """Have PostgreSQL end what takes longer than `limit` seconds, and the transaction go on."""
    begin: Callable[[], Any] = connection.begin_nested if connection.in_transaction() else connection.begin
    async with begin():
        before = await connection.scalar(_TIMEOUT)
        await _set_timeout(connection, f"{max(1, round(limit * 1000))}ms")
        yield
        await _set_timeout(connection, before)


async def _set_timeout(connection: AsyncConnection, value: str) -> None:
    await connection.execute(_SET, {"name": "statement_timeout", "value": value})


def _unmodified(state: InstanceState[Any]) -> list[str]:
    """What a refresh may load without a change of the caller's being lost."""
    mapper: Mapper[Any] = state.mapper
    loaded = [each.key for each in mapper.relationships if each.lazy in EAGER or each.key in state.dict]
    names = [*(each.key for each in mapper.column_attrs), *loaded]
    return [name for name in names if not state.attrs[name].history.has_changes()]
