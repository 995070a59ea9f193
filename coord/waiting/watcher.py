"""One watcher an engine: every wait for a row of one mapped class shares its reads with all the others."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from time import monotonic
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapper

from coord.database.schemas import Schemas, schemas_for
from coord.database.target import Key
from coord.errors import TooManyWaitersError
from coord.notify.bell import Bell
from coord.notify.channels import Channels
from coord.observation import tell_waiters
from coord.waiting.poller import Poller
from coord.waiting.reader import READ_TIMEOUT_SECONDS, Reader, Settings
from coord.waiting.waiter import NEAR_SECONDS, Waiter

Declared = Mapping[str, str] | Callable[["AsyncSession"], Mapping[str, str]] | None
"""`read_settings`: what the rows that a session reads depend on."""
MAX_WAITERS = 20_000
LINGER_SECONDS = 0.5
"""How long a class is still subscribed to, and its loop kept, that nobody waits for any more."""
DRAIN_SECONDS = 0.5
"""In which reads that no wait needs any more end by themselves: one that is cancelled costs its connection."""
MAX_OWN_READS = 4
"""Sessions that read by themselves at a time: the pool's connections are for others as well."""

_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")


@dataclass(eq=False, frozen=True, slots=True)
class _Coordination:
    """What an open `Coordinator` gives to the waits of its engine."""

    max_waiters: int
    declared: Declared
    bell: Bell | None
    channels: Channels


@dataclass(frozen=True, slots=True)
class OpenWait:
    """A wait, or an event stream, as it is now."""

    model: str
    key: Key
    job_id: UUID | None
    """Of the job that may end it."""
    seconds: float
    """Since it began."""


class Watcher:
    """The waits of one event loop for rows of one database.

    A poller for each mapped class, and for all settings under which its rows are read.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.waiters = 0
        self.own_reads = asyncio.Semaphore(MAX_OWN_READS)
        """Bounds the sessions that read by themselves."""
        self._coordinations: list[_Coordination] = []
        self._pollers: dict[tuple[Mapper[Any], Schemas, Settings | None], Poller] = {}
        self._idle_tasks: set[asyncio.Task[None]] = set()
        """Tasks of pollers that are closed."""
        self._lingering: set[Poller] = set()
        """Pollers that may have no waiters any more, until it is looked again."""
        self._draining = False
        self._timers: asyncio.TimerHandle | None = None
        """While there are waits: the next `_set_timers`."""

    @classmethod
    def of(cls, engine: AsyncEngine) -> Watcher:
        """The watcher that all waits through this engine share; it exists while one of them needs it."""
        watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
        if (watcher := watchers.get(engine.dialect)) is None:
            watcher = watchers[engine.dialect] = cls(engine)
        return watcher

    def settings_of(self, session: AsyncSession) -> Settings | None:
        """Those under which a shared read sees what this session sees; None if undeclared."""
        declared = next((each.declared for each in self._coordinations if each.declared is not None), None)
        return None if declared is None else checked_settings(declared(session) if callable(declared) else declared)

    def open_waits(self) -> Iterator[OpenWait]:
        """Those that callers have, and not what coord waits for on their behalf."""
        now = monotonic()
        for poller in [*self._pollers.values()]:
            for waiter in [each for waiters in poller.waiters.values() for each in waiters if each.counts]:
                job_id = None if waiter.job is None else waiter.job.target.key[0]
                model = waiter.target.mapper.class_.__name__
                yield OpenWait(model, waiter.target.key, job_id, now - waiter.began)

    def is_job_pending(self, job_id: object) -> bool:
        """Whether a job's message is still to be sent or unanswered, so that no worker is likely to have begun it."""
        return any(each.bell is not None and each.bell.is_pending(job_id) for each in self._coordinations)

    def poller(
        self, kind: type[Waiter[Any]], mapper: Mapper[Any], schemas: Schemas, settings: Settings | None
    ) -> Poller:
        """The one to register a waiter of this kind with, at once."""
        if kind.counts:
            _refuse_one_too_many()
        schemas = schemas_for(mapper, schemas)
        key = (mapper, schemas, settings)
        if (poller := self._pollers.get(key)) is None:
            poller = self._pollers[key] = Poller(self, Reader(self.engine, mapper, schemas, settings))
            poller.subscribe(*self._bell)
        if self._timers is None:
            self._set_timers_later()
        return poller

    def _set_timers_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timers = loop.call_later(NEAR_SECONDS / 2, self._set_timers, context=Context())

    def _set_timers(self) -> None:
        """Of the waits whose alarms are near by now."""
        self._timers, loop = None, asyncio.get_running_loop()
        waiting = [poller for poller in self._pollers.values() if poller.waiters]
        for waiter in [each for poller in waiting for waiters in poller.waiters.values() for each in waiters]:
            waiter.set_timer(loop)
        if waiting:
            self._set_timers_later()

    def on_leave(self, poller: Poller, waiter: Waiter[Any]) -> None:
        self.waiters -= waiter.counts
        tell_waiters(-waiter.counts)
        if poller.waiters or poller in self._lingering:
            return
        if self._coordinations:
            self._lingering.add(poller)
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._close_idle, poller)
        else:
            self._close_idle(poller)

    def _close_idle(self, poller: Poller) -> None:
        self._lingering.discard(poller)
        if poller.waiters or poller not in self._pollers.values():
            return
        self._pollers = {kind: other for kind, other in self._pollers.items() if other is not poller}
        poller.close()
        if poller.task is not None and not poller.task.done():
            self._idle_tasks.add(poller.task)
            poller.task.add_done_callback(self._idle_tasks.discard)
            if self._draining:
                poller.task.cancel()
        self._forget_if_idle()

    @contextmanager
    def coordinate(self, max_waiters: int, declared: Declared, bell: Bell | None, channels: Channels) -> Iterator[None]:
        """Use another cap, and messages, until the block ends, also for waits that have begun before.

        Of several at a time the first declaration counts, and the first bell; of caps the widest, whatever the engine.
        """
        own = _Coordination(max_waiters, declared, bell, channels)
        self._coordinations.append(own)
        self._draining = False
        self._resubscribe()
        try:
            yield
        finally:
            self._coordinations.remove(own)
            self._resubscribe()
            for poller in () if self._coordinations else [*self._lingering]:
                self._close_idle(poller)
            self._forget_if_idle()

    async def drain(self) -> None:
        """Stop reads that no wait needs, now and later on; their connections are in the pool again."""
        try:
            await self._ended(DRAIN_SECONDS)
        finally:
            self._draining = not self._coordinations
            for task in self._idle_tasks:
                task.cancel()
        await self._ended(READ_TIMEOUT_SECONDS)

    async def _ended(self, limit: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        while self._idle_tasks and (left := deadline - loop.time()) > 0:
            await asyncio.wait([*self._idle_tasks], timeout=left)

    def _resubscribe(self) -> None:
        for poller in self._pollers.values():
            poller.subscribe(*self._bell)

    @property
    def _bell(self) -> tuple[Bell | None, Channels | None]:
        found = ((each.bell, each.channels) for each in self._coordinations if each.bell is not None)
        return next(found, (None, None))

    def _forget_if_idle(self) -> None:
        if not self._pollers and not self._coordinations:
            _watchers.get(asyncio.get_running_loop(), {}).pop(self.engine.dialect, None)


def _refuse_one_too_many() -> None:
    """The cap is on the waits for all engines together: what they take is the process's memory."""
    watchers = _watchers.get(asyncio.get_running_loop(), {}).values()
    waiters = sum(watcher.waiters for watcher in watchers)
    caps = [each.max_waiters for watcher in watchers for each in watcher._coordinations]
    if waiters >= max(caps, default=MAX_WAITERS):
        raise TooManyWaitersError(f"{waiters} waits are as many as this process may have; try again shortly")


def open_waits(engines: Iterable[AsyncEngine]) -> list[OpenWait]:
    """Of this event loop, for rows that these engines read; the eldest first."""
    watchers = _watchers.get(asyncio.get_running_loop(), {})
    found = [watchers[engine.dialect] for engine in engines if engine.dialect in watchers]
    return sorted((wait for watcher in found for wait in watcher.open_waits()), key=lambda wait: -wait.seconds)


def checked_settings(declared: object) -> Settings:
    """`ValueError` unless it is a mapping of PostgreSQL's settings to their values."""
    if not isinstance(declared, Mapping):
        raise ValueError(  # noqa: TRY004 - it is an argument's value, or what an argument has returned
            f"read_settings is a mapping of PostgreSQL's settings to text, or gives one for a session; not {declared!r}"
        )
    for name, value in declared.items():
        if not isinstance(name, str) or not _SETTING_NAME.fullmatch(name):
            raise ValueError(f"read_settings has {name!r}, which is not the name of a setting of PostgreSQL")
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"read_settings[{name!r}] is text without a null character, not {value!r}")
    return tuple(sorted(declared.items()))


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Dialect, Watcher]] = WeakKeyDictionary()
"""A wait is given a session and no coordinator, so the waits of one engine find each other here.

Each engine has a dialect of its own, which the engines made by its `execution_options()` share.
"""
