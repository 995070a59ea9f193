"""One watcher an engine: every wait for a row of one mapped class shares its reads with all the others."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncConnection

from coord.errors import TooManyWaitersError
from coord.group import Group
from coord.reading import Reader
from coord.waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Dialect
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import Mapper

    from coord.baseline import Baseline
    from coord.hearing import Hearing
    from coord.schemas import Schemas
    from coord.target import M, Target

    Hear = Callable[[Mapper[Any], Schemas], Hearing | None]

MAX_WAITERS = 20_000


class Watcher:
    """The waits of one event loop for rows of one database: a group for each mapped class, and a cap on them all."""

    def __init__(self, source: AsyncEngine | AsyncConnection) -> None:
        self.source = source
        self.waiters = 0
        self.max_waiters = MAX_WAITERS
        self.coordinated = False
        self._hear: Hear = _hear_nothing
        self._groups: dict[tuple[Mapper[Any], Schemas], Group] = {}

    @contextmanager
    def register(
        self, target: Target[M], schemas: Schemas, baseline: Baseline, *, interval: float, fresh: bool
    ) -> Iterator[Waiter[M]]:
        """A place among the waiters, taken before the row is first read; `fresh` wants that first row in any case."""
        if self.waiters >= self.max_waiters:
            raise TooManyWaitersError(f"{self.waiters} waits are as many as this process may have; try again shortly")
        kind = (target.mapper, schemas)
        if (group := self._groups.get(kind)) is None:
            group = Group(Reader(self.source, target.mapper, schemas), self._hear(*kind))
            self._groups[kind] = group
        waiter = Waiter(group, target, baseline, interval=interval, fresh=fresh)
        self.waiters += 1
        group.add(waiter)
        try:
            yield waiter
        finally:
            group.remove(waiter)
            self.waiters -= 1
            if not group.waiters:
                del self._groups[kind]

    @contextmanager
    def coordinate(self, max_waiters: int, hear: Hear) -> Iterator[None]:
        """Have another cap and a bell until the block ends; waits that go on meanwhile hear it too."""
        if self.coordinated:
            raise RuntimeError("This engine has a Coordinator in this event loop already; one serves all its waits.")
        self._set(max_waiters, hear, coordinated=True)
        try:
            yield
        finally:
            self._set(MAX_WAITERS, _hear_nothing, coordinated=False)

    def _set(self, max_waiters: int, hear: Hear, *, coordinated: bool) -> None:
        self.max_waiters, self._hear, self.coordinated = max_waiters, hear, coordinated
        for kind, group in self._groups.items():
            group.hear(hear(*kind))


def _hear_nothing(_mapper: Mapper[Any], _schemas: Schemas) -> None:
    """Waits go by polling alone."""


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Dialect | AsyncConnection, Watcher]] = WeakKeyDictionary()
"""By loop, then by dialect: each engine has one of its own, which those made by its `execution_options()` share."""


@contextmanager
def watcher_of(source: AsyncEngine | AsyncConnection) -> Iterator[Watcher]:
    """The watcher that all waits through this engine or connection share; it is there while anybody needs it."""
    key = source if isinstance(source, AsyncConnection) else source.dialect
    watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
    watcher = watchers.setdefault(key, Watcher(source))
    try:
        yield watcher
    finally:
        if not watcher.waiters and not watcher.coordinated:
            watchers.pop(key, None)
