"""What the caller's own session reads: through its connection, in its context, under its schemas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import inspect, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import InstanceState, Mapper, Session, undefer
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from coord.cancellation import interruptible, uninterrupted
from coord.database.engine import bind_for_writes, engine_of, own_connection
from coord.database.schemas import Schemas, schemas_of
from coord.database.target import EAGER, M, Target, column_names
from coord.database.transaction import connection_mutex, cut_connections, end_transaction
from coord.errors import RowNotFoundError
from coord.jobs.model import Job
from coord.notify.changes import warn_if_uncoordinated
from coord.retryable import is_server_away
from coord.waiting.baseline import own_copy
from coord.waiting.job_wait import job_target
from coord.waiting.poller import RETRY_INTERVAL_SECONDS
from coord.waiting.reader import READ_TIMEOUT_SECONDS, SET
from coord.waiting.statements import comparisons_of, entity_of, options_of, parameters_of
from coord.waiting.waiter import LAST_READ_SECONDS, timed_out
from coord.waiting.watcher import Watcher

T = TypeVar("T")

RELEASE_SECONDS = 1.0
"""That a wait which is cancelled has to end the transaction that it has begun to end."""
ADOPTION_TIMEOUT_SECONDS = 5.0
"""That the session may take to load what belongs to a row that ends a wait without a deadline."""

_TIMEOUT = text("SELECT current_setting('statement_timeout')")


class OwnRow(NamedTuple, Generic[M]):
    """The row and the job as one read has found them."""

    row: M | None
    """Detached, with every column loaded and no relationship."""
    identity: tuple[Any, ...] | None
    """Which version it is, if `identified`."""
    job: Job | None


class SessionReader(Generic[M]):
    """A session and the row that it waits for: reads it, and makes it the session's own.

    In the transaction that the session is in, if that was left open, else in one that it begins by itself and that is
    ended afterwards: its connection is free between two reads. Of a session that is bound to one connection no read is
    ever cancelled, and its end is awaited, so that nothing runs there when the wait is over.
    """

    __slots__ = ("_unguarded", "began", "bound", "schemas", "session", "settings", "target", "watcher")

    def __init__(self, session: AsyncSession, target: Target[M], schemas: Schemas) -> None:
        warn_if_uncoordinated()
        self.session = session
        self.target = target
        self.schemas = schemas
        self.watcher = Watcher.of(engine_of(session, **bind_for_writes(target.mapper)))
        self.bound = own_connection(session) is not None
        self.settings = None if self.bound else self.watcher.settings_of(session)
        self.began = asyncio.get_running_loop().time()
        """When the wait did, on the loop's clock; of a watch, its present step."""
        self._unguarded = False
        """Whether a table lock can no longer make a read on the bound connection wait."""

    @property
    def shares_errors(self) -> bool:
        """Whether a failed read leaves the caller's own transaction aborted."""
        return self._unguarded if self.bound else self.session.in_transaction()

    async def read(self, deadline: float | None, *, identified: bool, job_id: UUID | None) -> OwnRow[M]:
        """The job first, so that the row is as the job has left it. `WaitTimeoutError` soon after the deadline."""
        limit = seconds_left(deadline)

        async def work() -> OwnRow[M]:
            async with self._connection() as connection:
                if not self.bound or self._unguarded:
                    return await self._read(connection, identified, job_id)
                async with _limited(connection, min(limit, READ_TIMEOUT_SECONDS)):
                    found = await self._read(connection, identified, job_id)
                self._unguarded = True  # this transaction now has a lock on the table that keeps others' away
                return found

        return await self._bounded(work(), limit)

    async def stores(self, seen: Mapping[str, Any], deadline: float | None) -> bool:
        """Whether these values, stored in the row's columns, are what is there."""

        async def work() -> bool:
            async with self._connection() as connection, connection.begin_nested():
                options = await connection.run_sync(partial(options_of, self.target.mapper, self.schemas))
                for statement, parameters in comparisons_of(self.target, seen):
                    if not await connection.scalar(statement, parameters, execution_options=options):
                        return False
            return True

        return await self._bounded(work(), seconds_left(deadline))

    async def adopt(self, row: M, deadline: float | None, *, alone: bool = True) -> M:
        """The session's own instance of the detached `row`, current as after its `refresh`.

        Without a query where there is nothing but columns to be loaded. `alone` is whether no other wait was handed
        this instance, so that it may become the session's.
        """
        session = self.session.sync_session
        state: InstanceState[M] = instance_state(row)
        values = state.dict
        assert state.key is not None
        own: M | None = session.identity_map.get(state.key)
        if _has_more_than_columns(state.mapper, own):
            return await self._refreshed(state.key, deadline)
        if own is not None or not alone:
            for name in column_names(state.mapper):
                values[name] = own_copy(values[name])
            if own is not None and state.mapper.version_id_col is not None:
                # merge() refuses another version as that of an outdated row.
                version = state.mapper.get_property_by_column(state.mapper.version_id_col).key
                set_committed_value(own, version, values[version])
            return session.merge(row, load=False)
        session.add(row)
        return row

    async def _refreshed(self, key: Any, deadline: float | None) -> M:
        """As after the session's `refresh`, but for what has changes that are not flushed."""
        mine: M | None = self.session.sync_session.identity_map.get(key)
        names = [] if mine is None else _unmodified(inspect(mine))  # an attempt that fails forgets what was loaded

        async def work() -> M:
            async with self._connection():
                with self.session.no_autoflush:
                    own: M | None = self.session.sync_session.identity_map.get(key)
                    if own is not None:  # since an attempt that has failed, perhaps with a part of what belongs to it
                        await self.session.refresh(own, names if own is mine else None)
                        return own
                    found = await self.session.get(self.target.mapper.class_, self.target.key, options=[undefer("*")])
            if found is None:
                raise RowNotFoundError(f"{self.target} was deleted")
            return found

        while True:
            try:
                return await self._bounded(work(), seconds_left(deadline))
            except Exception as error:
                if isinstance(error, InvalidRequestError) and "Could not refresh" in str(error):
                    raise RowNotFoundError(f"{self.target} was deleted") from error
                await self.before_retry(error, deadline)

    async def before_retry(self, error: Exception, deadline: float | None) -> None:
        """Return when a read that has failed may be repeated: the database is away, and the wait has time."""
        if self.shares_errors or not is_server_away(error):
            raise error
        if seconds_left(deadline) <= RETRY_INTERVAL_SECONDS:
            raise timed_out(self.target, self.began) from error
        await asyncio.sleep(RETRY_INTERVAL_SECONDS)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        """The session's, in its transaction; where it has none, as long as this lasts."""
        session, binding = self.session, dict(bind_for_writes(self.target.mapper))
        if (own := own_connection(session)) is not None:
            yield own
            return
        if session.in_transaction():
            yield await session.connection(bind_arguments=binding)
            return
        translated = self.schemas and self.schemas != schemas_of(session.sync_session)
        options = {"schema_translate_map": dict(self.schemas)} if translated else None
        async with self.watcher.own_reads:
            try:
                connection = await session.connection(bind_arguments=binding, execution_options=options)
                for name, value in self.settings or ():
                    await connection.execute(SET, {"name": name, "value": value})
                yield connection
            finally:
                await interruptible(end_transaction(session), grace=RELEASE_SECONDS)

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
            job = None if job_id is None else _one(session, job_target(job_id), self.schemas, identified=False)
            row = _one(session, self.target, self.schemas, identified=identified)
            return OwnRow(row and row[1], row and tuple(row[2:]), job and job[1])

    async def _bounded(self, work: Coroutine[Any, Any, T], limit: float) -> T:
        if not self.bound:
            try:
                return await interruptible(work, limit=limit, give_up=partial(cut_connections, self.session))
            except TimeoutError as error:
                raise timed_out(self.target, self.began) from error

        async def exclusively() -> T:
            async with connection_mutex(self.session):
                return await work

        return await uninterrupted(exclusively())


def seconds_left(deadline: float | None) -> float:
    """That a read of the session's may take: no wait ends later than a second after its deadline."""
    if deadline is None:
        return READ_TIMEOUT_SECONDS + ADOPTION_TIMEOUT_SECONDS
    return deadline + LAST_READ_SECONDS - asyncio.get_running_loop().time()


@lru_cache(maxsize=256)
def _on_its_bind(session_class: type[Session]) -> type[Session]:
    """With the class's hooks, but with no constructor and no `get_bind` of its own: a connection was chosen."""
    own = {"__init__": Session.__init__, "get_bind": lambda session, *_, **__: session.bind}
    return type(session_class.__name__, (session_class,), own)


def _one(session: Session, target: Target[Any], schemas: Schemas, *, identified: bool) -> Any:
    statement = entity_of(target.mapper, one=True, identified=identified)
    parameters = parameters_of(target.mapper, [target.key], one=True)
    options = options_of(target.mapper, schemas, session.connection())
    return session.execute(statement, parameters, execution_options=options).one_or_none()


@asynccontextmanager
async def _limited(connection: AsyncConnection, limit: float) -> AsyncIterator[None]:
    """Have PostgreSQL end what takes longer than `limit` seconds, and the transaction go on."""
    begin: Callable[[], Any] = connection.begin_nested if connection.in_transaction() else connection.begin
    async with begin():
        before = await connection.scalar(_TIMEOUT)
        await connection.execute(SET, {"name": "statement_timeout", "value": f"{max(1, round(limit * 1000))}ms"})
        yield
        await connection.execute(SET, {"name": "statement_timeout", "value": before})


def _has_more_than_columns(mapper: Mapper[Any], own: Any) -> bool:
    """Whether only the session itself can make its instance current: related rows, parts, changes not flushed."""
    if _has_eager_relationships(mapper):
        return True
    if own is None:
        return False
    state: InstanceState[Any] = instance_state(own)
    return bool(state.modified or mapper.composites or any(each.key in state.dict for each in mapper.relationships))


@lru_cache(maxsize=256)
def _has_eager_relationships(mapper: Mapper[Any]) -> bool:
    return any(each.lazy in EAGER for each in mapper.relationships)


def _unmodified(state: InstanceState[Any]) -> list[str]:
    """What a refresh may load without a change of the caller's being lost."""
    mapper: Mapper[Any] = state.mapper
    loaded = [each.key for each in mapper.relationships if each.lazy in EAGER or each.key in state.dict]
    names = [*(each.key for each in mapper.column_attrs), *loaded]
    return [name for name in names if not state.attrs[name].history.has_changes()]
