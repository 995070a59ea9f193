"""One watcher an engine: every wait for a row of one mapped class shares its reads with all the others."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncConnection

from coord.errors import TooManyWaitersError
from coord.waiting.group import Group
from coord.waiting.reading import READ_LIMIT, Reader
from coord.waiting.waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Dialect
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import Mapper

    from coord.postgresql.schemas import Schemas
    from coord.target import M, Target
    from coord.waiting.baseline import Baseline
    from coord.waiting.hearing import Hearing

    Hear = Callable[[Mapper[Any], Schemas], Hearing | None]

MAX_WAITERS = 20_000


class Watcher:
    """The waits of one event loop for rows of one database: a group for each mapped class, and a cap on them all."""

    def __init__(self, source: AsyncEngine | AsyncConnection) -> None:
        self.source = source
        self.waiters = 0
        self._max_waiters = MAX_WAITERS
        self._coordinated = False
        self._hear: Hear = _hear_nothing
        self.holds: Callable[[object], bool] = _hold_nothing
        """Whether a job is only being handed over, so that hardly anybody can have begun it."""
        self._groups: dict[tuple[Mapper[Any], Schemas], Group] = {}
        self._unwanted: set[asyncio.Task[None]] = set()
        """Those that read for nobody any more."""
        self._resting = False

    @classmethod
    def of(cls, source: AsyncEngine | AsyncConnection) -> Watcher:
        """The watcher that all waits through this engine or connection share; it is there while anybody needs it."""
        watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
        key = _key(source)
        if (watcher := watchers.get(key)) is None:
            watcher = watchers[key] = cls(source)
        return watcher

    def register(
        self,
        target: Target[M],
        schemas: Schemas,
        baseline: Baseline,
        *,
        interval: float,
        fresh: bool = False,
        patient: bool = False,
        make: Callable[..., Waiter[M]] = Waiter,
    ) -> Waiter[M]:
        """A place among the waiters from now until the waiter's block ends.

        `fresh` wants its first row in any case, `patient` knows that nothing can happen to it before its bell is heard.
        """
        if make is Waiter and self.waiters >= self._max_waiters:
            raise TooManyWaitersError(f"{self.waiters} waits are as many as this process may have; try again shortly")
        kind = (target.mapper, schemas)
        if (group := self._groups.get(kind)) is None:
            group = Group(Reader(self.source, target.mapper, schemas), self._hear(*kind), on_leave=self._left)
            self._groups[kind] = group
        waiter = make(group, target, baseline, interval=interval, fresh=fresh)
        waiter.patient = patient
        group.add(waiter)
        self.waiters += waiter.counts
        return waiter

    @contextmanager
    def coordinate(self, max_waiters: int, hear: Hear, holds: Callable[[object], bool]) -> Iterator[None]:
        """Have another cap and a bell until the block ends; waits that go on meanwhile hear it too."""
        if self._coordinated:
            raise RuntimeError("This engine has a Coordinator in this event loop already; one serves all its waits.")
        self._set(max_waiters, hear, coordinated=True)
        self.holds, self._resting = holds, False
        try:
            yield
        finally:
            self._set(MAX_WAITERS, _hear_nothing, coordinated=False)
            self.holds = _hold_nothing
            self._forget_if_idle()

    async def rest(self) -> None:
        """Stop what reads for nobody, now and later on, in `READ_LIMIT` at most: the pool has its connections back."""
        self._resting = True
        for task in self._unwanted:
            task.cancel()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + READ_LIMIT
        while self._unwanted and (left := deadline - loop.time()) > 0:
            await asyncio.wait([*self._unwanted], timeout=left)

    def _set(self, max_waiters: int, hear: Hear, *, coordinated: bool) -> None:
        self._max_waiters, self._hear, self._coordinated = max_waiters, hear, coordinated
        for kind, group in self._groups.items():
            group.hear(hear(*kind))

    def _left(self, group: Group, waiter: Waiter[Any]) -> None:
        self.waiters -= waiter.counts
        if not group.waiters:
            self._groups = {kind: other for kind, other in self._groups.items() if other is not group}
            if group.task is not None and not group.task.done():
                self._unwanted.add(group.task)
                group.task.add_done_callback(self._unwanted.discard)
                if self._resting:
                    group.task.cancel()
            self._forget_if_idle()

    def _forget_if_idle(self) -> None:
        if not self._groups and not self._coordinated:
            _watchers.get(asyncio.get_running_loop(), {}).pop(_key(self.source), None)


def _key(source: AsyncEngine | AsyncConnection) -> Dialect | AsyncConnection:
    """Each engine has a dialect of its own, which the engines made by its `execution_options()` share."""
    return source if isinstance(source, AsyncConnection) else source.dialect


def _hear_nothing(_mapper: Mapper[Any], _schemas: Schemas) -> None:
    """Waits go by polling alone."""


def _hold_nothing(_job_id: object) -> bool:
    """Whatever is to be handed over is handed over by somebody else."""
    return False


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Dialect | AsyncConnection, Watcher]] = WeakKeyDictionary()
"""A wait is given a session and no coordinator, so this is where waits of one engine meet."""
