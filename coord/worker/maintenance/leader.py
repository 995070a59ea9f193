"""Which worker looks after the queue: one that reaches both servers, by a lease in PostgreSQL that lasts seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import timedelta
from typing import Any

from sqlalchemy import func, literal, null, or_, update
from sqlalchemy.dialects.postgresql import insert

from coord.jobs.model import queues
from coord.worker.maintenance.loops import Loop
from coord.worker.state import WorkerState

logger = logging.getLogger("arq.coord")

NOW = "return redis.call('TIME')"
"""A script, since who may run none can look after nothing."""
LEASE_SECONDS = 3.0
MARGIN_SECONDS = 0.5
"""Before its end by which the leader takes its lease for over."""


class Leader(Loop):
    """Asks for the lease once a second, right after Redis has answered: who is cut off from either loses it.

    Redis' answer is its time, and goes on the heartbeat's board if Redis does what the fetcher asks for. Another may
    take over as soon as the block has ended.
    """

    limit = LEASE_SECONDS

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        state = self._state
        state.leads_until = 0.0
        mine = update(queues).where(queues.c.name == state.keys.queue, queues.c.leader == state.id)
        try:
            async with asyncio.timeout(self.limit):
                await state.execute(mine.values(leader=null(), leader_until=null()))
        except Exception as error:  # noqa: BLE001 - the lease ends by itself
            logger.debug("The lease could not be given up: %s", error)

    async def round(self) -> None:
        state = self._state
        asked = time.monotonic()
        redis: Any = state.redis
        seconds, microseconds = map(int, await redis.eval(NOW, 0))
        state.clock.set(seconds, microseconds, asked)
        began = time.monotonic()
        if state.is_served:
            state.board.redis_answered = began
        leads = bool(await state.read(_lease(state)))
        if leads and not state.leads_until:
            logger.info("This worker looks after the queue %s now", state.keys.queue)
        state.leads_until = began + LEASE_SECONDS - MARGIN_SECONDS if leads else 0.0


def _lease(state: WorkerState) -> Any:
    own, now = state.id, func.clock_timestamp()
    until = now + literal(timedelta(seconds=LEASE_SECONDS))
    statement = insert(queues).values(name=state.keys.queue, leader=own, leader_until=until)
    is_over = or_(queues.c.leader_until < now, queues.c.leader_until > until)  # or the clock was set back meanwhile
    free = or_(queues.c.leader.is_(None), queues.c.leader == own, is_over)
    taken = {"leader": statement.excluded.leader, "leader_until": statement.excluded.leader_until}
    return statement.on_conflict_do_update(index_elements=[queues.c.name], set_=taken, where=free).returning(
        queues.c.leader
    )
