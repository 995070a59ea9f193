"""The coordinator: what a process runs beside its requests so that waits are woken instead of polling."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from inspect import iscoroutinefunction
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Mapper, Session

from coord.database.engine import AnySession, engine_of, engines_of, made_by, prepare, session_of
from coord.database.lost_answers import LostAnswers
from coord.database.target import key_of, mapper_of
from coord.durations import whole
from coord.jobs.model import ledger_engine
from coord.jobs.options import checked_text
from coord.notify.bell import Bell
from coord.notify.changes import Changed, announce, observed, written_to
from coord.notify.channels import Channels
from coord.notify.client import close_client
from coord.notify.outage import Outage
from coord.notify.sentinel import redis_from_url
from coord.notify.subscriber import Listener
from coord.observation import observers
from coord.queue.handover import hand_over
from coord.timings import attempt_payload
from coord.waiting.watcher import MAX_WAITERS, Declared, Watcher, checked_settings

logger = logging.getLogger("coord.bell")


class Coordinator:
    """Publishes which rows the sessions of this engine change, and wakes the waits of this process for them.

    Sessions are recognised by their engine, whichever maker made them; of a maker with `binds` all engines count.
    Messages are sent after the outermost commit, never delay or fail it, and are hints: a wait reads the row again, and
    reads it once an interval without any. `namespace` and the database's name keep services apart that share a Redis.
    Without `redis` waits go by polling alone. One wait more than `max_waiters` in this process, for all engines, is a
    `TooManyWaitersError`; of several coordinators the widest cap counts.

    `read_settings` declares what rows depend on besides the database's state: `{}`, nothing, so that one query serves
    all waits for rows of a class; or the settings of PostgreSQL under which a session reads, as a mapping or as a
    function of the session (`{"app.tenant": ..., "search_path": ...}`), which the shared read has for its transaction
    alone. Undeclared, the shared read only wakes the waits, and each session reads its row by itself.

        coordinator = Coordinator(session_maker, redis="redis://localhost:6379/0", read_settings={})
        app = FastAPI(lifespan=coordinator.lifespan)

    Nothing connects before the block is entered, and Redis may be away then. It makes two connections to Redis of its
    own, one to publish and one to subscribe; a client that it is given only shows where, and is not closed. While an
    answer of PostgreSQL's is late it makes one beside the pool, to find out whether that was lost (docs/faults.md). At
    the block's end reads that no wait needs any more are stopped, so that the engine can be disposed of.
    """

    def __init__(
        self,
        session_maker: async_sessionmaker[AsyncSession],
        *,
        redis: str | Redis | None = None,
        namespace: str = "coord",
        max_waiters: int = MAX_WAITERS,
        read_settings: Declared = None,
    ) -> None:
        if redis is not None and not isinstance(redis, str | Redis):
            raise ValueError(f"redis is a URL or a Redis client, not {redis!r}")
        if iscoroutinefunction(read_settings):
            raise TypeError("read_settings is a mapping or a plain function of the session, not an asynchronous one")
        if read_settings is not None and not callable(read_settings):
            checked_settings(read_settings)
        self._read_settings = read_settings
        self._session_maker = session_maker
        engines_of(made_by(session_maker))  # refuses what is not PostgreSQL's; there may be none yet
        self._redis = redis_from_url(redis) if isinstance(redis, str) else redis
        self._owns_redis = isinstance(redis, str)
        self._namespace = checked_text("namespace", namespace)
        self.outage = Outage(
            logger, away="Redis is away, waits go on by polling and new jobs later", back="Redis is back, all goes on"
        )
        self._max_waiters = whole("max_waiters", max_waiters)
        self._bell: Bell | None = None
        self._watchers: list[Watcher] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("This Coordinator is open already; it has one block at a time.")
        engines = engines_of(self._session_maker()) or [engine_of(self._session_maker)]
        self._loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            stack.callback(setattr, self, "_loop", None)
            stack.push_async_callback(self._drain)  # last of all: waits that are cancelled meanwhile are gone by then
            if self._redis is not None:
                if self._owns_redis:
                    stack.push_async_callback(close_client, self._redis)
                self._bell = await stack.enter_async_context(Bell(self._redis, self.outage).open())
                stack.callback(setattr, self, "_bell", None)
            for engine in engines:
                prepare(engine)
                channels, watcher = self._channels(engine), Watcher.of(engine)
                self._watchers.append(watcher)
                stack.enter_context(watcher.coordinate(self._max_waiters, self._read_settings, self._bell, channels))
                stack.enter_context(observed(engine.dialect, partial(self._publish_changes, channels)))
                await stack.enter_async_context(LostAnswers(engine))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def lifespan(self, _app: Any) -> AsyncIterator[None]:
        """For `FastAPI(lifespan=coordinator.lifespan)`."""
        async with self:
            yield

    def ring(self, session: AnySession, model: type[Any], pk_value: Any = None) -> None:
        """Announce what raw SQL has changed: one row, or with no key any row of the table.

        Sent after the session's commit and not after its rollback; at once when no transaction is open.
        """
        mapper = mapper_of(model)
        key = None if pk_value is None else key_of(mapper, pk_value)
        session = session_of(session)
        dialect = written_to(session.sync_session, mapper)
        if all(watcher.engine.dialect is not dialect for watcher in self._watchers):
            raise ValueError(f"the session writes {model.__name__} to another engine than the coordinator's")
        announce(session.sync_session, dialect, (mapper, key))

    def listen(self, channel: bytes, listener: Listener) -> None:
        """Notify a worker's listener of a channel as long as this is open; nothing without Redis."""
        if self._bell is not None:
            self._bell.listen(channel, listener)

    def publish(self, mapper: Mapper[Any], ids: Iterable[object]) -> None:
        """Notify of rows that this process has changed otherwise than by a session, and committed."""
        if self._bell is not None:
            self._bell.publish([self.channels.row(mapper, (), (id_,)) for id_ in ids])

    async def _drain(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            await watcher.drain()

    @property
    def channels(self) -> Channels:
        """Those of the database that has the ledger."""
        return self._channels(ledger_engine(self._session_maker))

    def _channels(self, engine: AsyncEngine) -> Channels:
        return Channels(self._namespace, engine.url.database or "")

    def _publish_changes(self, to: Channels, session: Session, changes: Changed) -> bool:
        loop = self._loop
        if self._bell is None or loop is None or loop.is_closed():
            return False
        try:
            # No wait is for a job that is new.
            known = [change for change, job in changes.items() if job is None or job.attempt > 1 or job.state.is_final]
            channels = to.of_changes(session, known)
            jobs = [job for job in changes.values() if job is not None]
            batch = hand_over(jobs, self._namespace) if jobs else {}
            payload = attempt_payload(session)
            for observer in observers:
                observer.hints("published", len(channels))
        except Exception:
            logger.exception("Changes could not be published; waits see them by polling")
            return True
        if _running_loop() is loop:
            self._bell.publish(channels, batch, payload)
        else:
            loop.call_soon_threadsafe(self._bell.publish, channels, batch, payload)
        return True


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
