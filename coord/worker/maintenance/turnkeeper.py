"""Turns that nobody passes on: their worker has died, or somebody has cancelled the job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from coord.jobs.model import jobs
from coord.worker.maintenance.loops import Loop
from coord.worker.turns import has_turn, is_waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.turns import Turns


class TurnKeeper(Loop):
    """Works only while this worker leads, for the keys of all queues. `engine` commits each statement."""

    def __init__(self, engine: AsyncEngine, turns: Turns, is_leader: Callable[[], bool]) -> None:
        super().__init__()
        self._engine = engine
        self._turns = turns
        self._is_leader = is_leader

    async def round(self) -> None:
        if not self._is_leader():
            return
        async with self._engine.connect() as connection:
            free = [*await connection.scalars(free_keys())]
        if free:
            await self._turns.pass_on(free)


def free_keys() -> Any:
    """The keys that jobs wait with and nobody has the turn of, at a cost that grows with the keys and not the jobs."""
    key = jobs.c.one_at_a_time
    first = select(key.label("key")).where(is_waiting).order_by(key).limit(1)
    keys = select(first.subquery().c.key).cte("keys", recursive=True)
    following = select(key).where(is_waiting, key > keys.c.key).order_by(key).limit(1).correlate(keys)
    keys = keys.union_all(select(following.scalar_subquery()).where(keys.c.key.is_not(None)))
    return select(keys.c.key).where(keys.c.key.is_not(None), ~has_turn(keys.c.key))
