"""One watcher an engine: every wait for a row of one mapped class shares its reads with all the others."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from coord.errors import TooManyWaitersError
from coord.waiting.handed import HandingPoller
from coord.waiting.reader import READ_LIMIT, Reader
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
"""How many sessions read by themselves at a time: others want the pool's connections as well."""


class Watcher:
    """The waits of one event loop for rows of one database, and a cap on them all.

    A poller for each mapped class, and for all settings under which its rows are read.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.waiters = 0
        self.turns = asyncio.Semaphore(MAX_OWN_READS)
        """Of the sessions that read by themselves."""
        self._max_waiters = MAX_WAITERS
        self._declared: Declared = None
        self._coordinated = False
        self._subscribe: Subscribe = _subscribe_to_nothing
        self.holds: Callable[[object], bool] = _hold_nothing
        """Whether a job is only being handed over, so that hardly anybody can have begun it."""
        self._pollers: dict[tuple[Mapper[Any], Schemas, Settings | None], Poller] = {}
        self._unwanted: set[asyncio.Task[None]] = set()
        """Those that read for nobody any more."""
        self._draining = False

    @classmethod
    def of(cls, engine: AsyncEngine) -> Watcher:
        """The watcher that all waits through this engine share; it is there while anybody needs it."""
        watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
        if (watcher := watchers.get(engine.dialect)) is None:
            watcher = watchers[engine.dialect] = cls(engine)
        return watcher

    def settings_of(self, session: AsyncSession) -> Settings | None:
        """What the rows that the session reads depend on, as the coordinator was told; None if it was not."""
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
        patient: bool = False,
        counts: bool = True,
    ) -> W:
        """A place among the waiters from now until the waiter's block ends.

        `patient` knows that nothing can happen to its row without a message; what `counts` is one of those that a
        process may have.
        """
        if counts and self.waiters >= self._max_waiters:
            raise TooManyWaitersError(f"{self.waiters} waits are as many as this process may have; try again shortly")
        kind = (target.mapper, schemas, settings)
        if (poller := self._pollers.get(kind)) is None:
            poller = self._pollers[kind] = self._poller(*kind)
        waiter = make(poller, target, baseline, interval=interval)
        waiter.patient = patient
        poller.add(waiter)
        self.waiters += waiter.counts
        return waiter

    def _poller(self, mapper: Mapper[Any], schemas: Schemas, settings: Settings | None) -> Poller:
        made = WakingPoller if settings is None else HandingPoller
        reader = Reader(self.engine, mapper, schemas, settings)
        return made(reader, self._subscribe(mapper, schemas), on_leave=self._left)

    @contextmanager
    def coordinate(
        self, max_waiters: int, declared: Declared, subscribe: Subscribe, holds: Callable[[object], bool]
    ) -> Iterator[None]:
        """Have another cap and messages until the block ends; waits that go on meanwhile have them too."""
        if self._coordinated:
            raise RuntimeError("This engine has a Coordinator in this event loop already; one serves all its waits.")
        self._set(max_waiters, declared, subscribe, coordinated=True)
        self.holds, self._draining = holds, False
        try:
            yield
        finally:
            self._set(MAX_WAITERS, None, _subscribe_to_nothing, coordinated=False)
            self.holds = _hold_nothing
            self._forget_if_idle()

    async def drain(self) -> None:
        """Stop reads that no wait needs, now and later on, within `READ_LIMIT`; the pool has its connections back."""
        self._draining = True
        for task in self._unwanted:
            task.cancel()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + READ_LIMIT
        while self._unwanted and (left := deadline - loop.time()) > 0:
            await asyncio.wait([*self._unwanted], timeout=left)

    def _set(self, max_waiters: int, declared: Declared, subscribe: Subscribe, *, coordinated: bool) -> None:
        self._max_waiters, self._declared, self._coordinated = max_waiters, declared, coordinated
        self._subscribe = subscribe
        for (mapper, schemas, _), poller in self._pollers.items():
            poller.subscribe(subscribe(mapper, schemas))

    def _left(self, poller: Poller, waiter: Waiter[Any]) -> None:
        self.waiters -= waiter.counts
        if not poller.waiters:
            self._pollers = {kind: other for kind, other in self._pollers.items() if other is not poller}
            if poller.task is not None and not poller.task.done():
                self._unwanted.add(poller.task)
                poller.task.add_done_callback(self._unwanted.discard)
                if self._draining:
                    poller.task.cancel()
            self._forget_if_idle()

    def _forget_if_idle(self) -> None:
        if not self._pollers and not self._coordinated:
            _watchers.get(asyncio.get_running_loop(), {}).pop(self.engine.dialect, None)


def _subscribe_to_nothing(_mapper: Mapper[Any], _schemas: Schemas) -> None:
    """Waits go by polling alone."""


def _hold_nothing(_job_id: object) -> bool:
    """Whatever is to be handed over is handed over by somebody else."""
    return False


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Dialect, Watcher]] = WeakKeyDictionary()
"""A wait is given a session and no coordinator, so this is where waits of one engine meet.

Each engine has a dialect of its own, which the engines made by its `execution_options()` share.
"""
