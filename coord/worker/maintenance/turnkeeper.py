"""Turns that nobody passes on: their worker has died, or somebody has cancelled the job."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from coord.jobs.model import jobs
from coord.worker.maintenance.loops import Loop
from coord.worker.state import WorkerState
from coord.worker.turns import Turns, has_turn, is_waiting


class TurnKeeper(Loop):
    """Works only while this worker leads, for the keys of all queues."""

    def __init__(self, state: WorkerState, turns: Turns) -> None:
        super().__init__(state)
        self._turns = turns

    async def round(self) -> None:
        if self._state.is_leader:
            await self._turns.pass_on([row.key for row in await self._state.read(free_keys())])


def free_keys() -> Any:
    """The keys that jobs wait with and nobody has the turn of, at a cost that grows with the keys and not the jobs."""
    key = jobs.c.one_at_a_time
    first = select(key.label("key")).where(is_waiting).order_by(key).limit(1)
    keys = select(first.subquery().c.key).cte("keys", recursive=True)
    following = select(key).where(is_waiting, key > keys.c.key).order_by(key).limit(1).correlate(keys)
    keys = keys.union_all(select(following.scalar_subquery()).where(keys.c.key.is_not(None)))
    return select(keys.c.key).where(keys.c.key.is_not(None), ~has_turn(keys.c.key))
