"""One watcher an engine: every wait for a row of one mapped class shares its reads with all the others."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncConnection

from coord.engine import engine_of
from coord.errors import TooManyWaitersError
from coord.group import Group, Waiter
from coord.reading import Reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy.engine import Dialect
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from sqlalchemy.orm import Mapper

    from coord.baseline import Baseline
    from coord.target import M, Target

    Schemas = tuple[tuple[str | None, str | None], ...]

MAX_WAITERS = 20_000


class Watcher:
    """The waits of one event loop for rows of one database: a group for each mapped class, and a cap on them all."""

    def __init__(self, source: AsyncEngine | AsyncConnection, *, max_waiters: int = MAX_WAITERS) -> None:
        self.source = source
        self.max_waiters = max_waiters
        self.waiters = 0
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
            group = self._groups[kind] = Group(Reader(self.source, target.mapper, dict(schemas)))
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


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Dialect | AsyncConnection, Watcher]] = WeakKeyDictionary()
"""By loop, then by dialect: each engine has one of its own, which those made by its `execution_options()` share."""


@contextmanager
def watcher_of(session: AsyncSession) -> Iterator[Watcher]:
    """The watcher that waits of this session share. It is there while anybody waits."""
    engine = engine_of(session)
    source = session.bind if isinstance(session.bind, AsyncConnection) else engine
    key = source if isinstance(source, AsyncConnection) else engine.dialect
    watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
    watcher = watchers.setdefault(key, Watcher(source))
    try:
        yield watcher
    finally:
        if not watcher.waiters:
            watchers.pop(key, None)


def schemas_of(session: AsyncSession) -> Schemas:
    """The `schema_translate_map` of the session (SQLAlchemy 2.1), else of the engine or connection it is bound to."""
    options: Mapping[str, Any] = getattr(session.sync_session, "execution_options", {})
    bind = session.sync_session.bind
    if "schema_translate_map" not in options and bind is not None:
        options = bind.get_execution_options()
    return tuple((options.get("schema_translate_map") or {}).items())
