"""One watcher an engine: every wait for a row of one mapped class shares its reads with all the others."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from coord.errors import TooManyWaitersError
from coord.observation import tell_waiters
from coord.waiting.handed import HandingPoller
from coord.waiting.reader import READ_TIMEOUT_SECONDS, Reader
from coord.waiting.settings import settings_of
from coord.waiting.woken import WakingPoller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Dialect
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from sqlalchemy.orm import Mapper

    from coord.database.schemas import Schemas
    from coord.database.target import Target
    from coord.waiting.baseline import Baseline
    from coord.waiting.poller import Poller
    from coord.waiting.settings import Declared, Settings
    from coord.waiting.subscription import RowSubscription
    from coord.waiting.waiter import Waiter

    Subscribe = Callable[[Mapper[Any], Schemas], RowSubscription | None]

W = TypeVar("W", bound="Waiter[Any]")

MAX_WAITERS = 20_000
MAX_OWN_READS = 4
"""Sessions that read by themselves at a time: the pool's connections are for others as well."""


class Watcher:
    """The waits of one event loop for rows of one database, and a cap on them all.

    A poller for each mapped class, and for all settings under which its rows are read.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.waiters = 0
        self.own_reads = asyncio.Semaphore(MAX_OWN_READS)
        """Bounds the sessions that read by themselves."""
        self._max_waiters = MAX_WAITERS
        self._declared: Declared = None
        self._coordinated = False
        self._subscribe: Subscribe = _subscribe_to_nothing
        self.is_job_pending: Callable[[object], bool] = _is_never_pending
        """Whether a job's message is still to be sent or unanswered, so that no worker is likely to have begun it."""
        self._pollers: dict[tuple[Mapper[Any], Schemas, Settings | None], Poller] = {}
        self._idle_tasks: set[asyncio.Task[None]] = set()
        """Tasks of pollers whose last waiter has left."""
        self._draining = False

    @classmethod
    def of(cls, engine: AsyncEngine) -> Watcher:
        """The watcher that all waits through this engine share; it exists while one of them needs it."""
        watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
        if (watcher := watchers.get(engine.dialect)) is None:
            watcher = watchers[engine.dialect] = cls(engine)
        return watcher

    def settings_of(self, session: AsyncSession) -> Settings | None:
        """What the rows that the session reads depend on, as declared to the coordinator; None if undeclared."""
        return settings_of(self._declared, session)

    def register(
        self,
        target: Target[Any],
        schemas: Schemas,
        baseline: Baseline,
        *,
        settings: Settings | None,
        interval: float,
        make: Callable[..., W],
        awaits_message: bool = False,
        counts: bool = True,
    ) -> W:
        """A waiter, registered from now until its block ends.

        With `awaits_message` its row cannot change without a message; if it `counts`, it takes one of `max_waiters`.
        """
        if counts and self.waiters >= self._max_waiters:
            raise TooManyWaitersError(f"{self.waiters} waits are as many as this process may have; try again shortly")
        kind = (target.mapper, schemas, settings)
        if (poller := self._pollers.get(kind)) is None:
            poller = self._pollers[kind] = self._poller(*kind)
        waiter = make(poller, target, baseline, interval=interval)
        waiter.awaits_message = awaits_message
        poller.add(waiter)
        self.waiters += waiter.counts
        tell_waiters(waiter.counts)
        return waiter

    def _poller(self, mapper: Mapper[Any], schemas: Schemas, settings: Settings | None) -> Poller:
        made = WakingPoller if settings is None else HandingPoller
        reader = Reader(self.engine, mapper, schemas, settings)
        return made(reader, self._subscribe(mapper, schemas), on_leave=self._left)

    @contextmanager
    def coordinate(
        self, max_waiters: int, declared: Declared, subscribe: Subscribe, is_job_pending: Callable[[object], bool]
    ) -> Iterator[None]:
        """Use another cap, and messages, until the block ends, also for waits that have begun before."""
        if self._coordinated:
            raise RuntimeError("This engine has a Coordinator in this event loop already; one serves all its waits.")
        self._set(max_waiters, declared, subscribe, coordinated=True)
        self.is_job_pending, self._draining = is_job_pending, False
        try:
            yield
        finally:
            self._set(MAX_WAITERS, None, _subscribe_to_nothing, coordinated=False)
            self.is_job_pending = _is_never_pending
            self._forget_if_idle()

    async def drain(self) -> None:
        """Stop reads that no wait needs, now and later on; their connections are in the pool again."""
        self._draining = True
        for task in self._idle_tasks:
            task.cancel()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + READ_TIMEOUT_SECONDS
        while self._idle_tasks and (left := deadline - loop.time()) > 0:
            await asyncio.wait([*self._idle_tasks], timeout=left)

    def _set(self, max_waiters: int, declared: Declared, subscribe: Subscribe, *, coordinated: bool) -> None:
        self._max_waiters, self._declared, self._coordinated = max_waiters, declared, coordinated
        self._subscribe = subscribe
        for (mapper, schemas, _), poller in self._pollers.items():
            poller.subscribe(subscribe(mapper, schemas))

    def _left(self, poller: Poller, waiter: Waiter[Any]) -> None:
        self.waiters -= waiter.counts
        tell_waiters(-waiter.counts)
        if not poller.waiters:
            self._pollers = {kind: other for kind, other in self._pollers.items() if other is not poller}
            if poller.task is not None and not poller.task.done():
                self._idle_tasks.add(poller.task)
                poller.task.add_done_callback(self._idle_tasks.discard)
                if self._draining:
                    poller.task.cancel()
            self._forget_if_idle()

    def _forget_if_idle(self) -> None:
        if not self._pollers and not self._coordinated:
            _watchers.get(asyncio.get_running_loop(), {}).pop(self.engine.dialect, None)


def _subscribe_to_nothing(_mapper: Mapper[Any], _schemas: Schemas) -> None:
    """Waits go by polling alone."""


def _is_never_pending(_job_id: object) -> bool:
    """Without a coordinator this process sends no messages."""
    return False


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Dialect, Watcher]] = WeakKeyDictionary()
"""A wait is given a session and no coordinator, so the waits of one engine find each other here.

Each engine has a dialect of its own, which the engines made by its `execution_options()` share.
"""
