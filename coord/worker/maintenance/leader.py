"""Which worker looks after the queue: one that reaches both servers, by a lease in PostgreSQL that lasts seconds."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, literal, null, or_, update
from sqlalchemy.dialects.postgresql import insert

from coord.jobs.model import queues
from coord.worker.maintenance.loops import Loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from redis.asyncio import Redis
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.freshness import RedisClock
    from coord.worker.maintenance.beat import Board

logger = logging.getLogger("arq.coord")

NOW = "return redis.call('TIME')"
"""A script, since who may run none can look after nothing."""
LEASE_SECONDS = 3.0
MARGIN_SECONDS = 0.5
"""Before its end by which the leader takes its lease for over."""


class Leader(Loop):
    """Asks for the lease once a second, right after Redis has answered: who is cut off from either loses it.

    Redis' answer is its time, and goes on the heartbeat's board if `is_served` says that Redis does what is asked.
    """

    limit = LEASE_SECONDS

    def __init__(
        self,
        engine: AsyncEngine,
        redis: Redis,
        queue: str,
        own: UUID,
        clock: RedisClock,
        board: Board,
        is_served: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._engine = engine
        self._redis: Any = redis
        self._queue = queue
        self._own = own
        self._clock = clock
        self._board = board
        self._is_served = is_served
        self._until = 0.0
        """Of the lease, on the monotonic clock."""

    @property
    def is_leader(self) -> bool:
        return time.monotonic() < self._until

    async def round(self) -> None:
        asked = time.monotonic()
        seconds, microseconds = map(int, await self._redis.eval(NOW, 0))
        self._clock.set(seconds, microseconds, asked)
        if self._is_served():
            self._board.redis_answered = time.monotonic()
        began = time.monotonic()
        async with self._engine.connect() as connection:
            leads = (await connection.execute(_lease(self._queue, self._own))).one_or_none() is not None
        if leads and not self._until:
            logger.info("This worker looks after the queue %s now", self._queue)
        self._until = began + LEASE_SECONDS - MARGIN_SECONDS if leads else 0.0

    async def resign(self) -> None:
        """Let another take over at once."""
        self._until = 0.0
        mine = update(queues).where(queues.c.name == self._queue, queues.c.leader == self._own)
        async with self._engine.connect() as connection:
            await connection.execute(mine.values(leader=null(), leader_until=null()))


def _lease(queue: str, own: UUID) -> Any:
    until = func.clock_timestamp() + literal(timedelta(seconds=LEASE_SECONDS))
    statement = insert(queues).values(name=queue, leader=own, leader_until=until)
    free = or_(queues.c.leader.is_(None), queues.c.leader == own, queues.c.leader_until < func.clock_timestamp())
    taken = {"leader": statement.excluded.leader, "leader_until": statement.excluded.leader_until}
    return statement.on_conflict_do_update(index_elements=[queues.c.name], set_=taken, where=free).returning(
        queues.c.leader
    )
