"""The reconciler: compares the ledger with Redis and the heartbeats, and hands over again what is nowhere.

It reads them in the order in which a job goes through them: ledger, feed, what was taken, heartbeats. Who is on its way
from one to the next is seen in one of them; what is missing in two looks, and was missing for longer than a worker may
take from a pop to its first sign, is nobody's.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from redis.exceptions import OutOfMemoryError
from sqlalchemy import Row, func, literal, select

from coord.jobs.model import jobs, workers
from coord.queue.keys import due_of, rank_of, soon_member, taken_member
from coord.queue.message import Message
from coord.worker.maintenance.loops import Loop
from coord.worker.maintenance.registry import named
from coord.worker.maintenance.rows import PAGE, QueuedJobs
from coord.worker.state import WorkerState

Key = tuple[UUID, int]

logger = logging.getLogger("arq.coord")

MISSING_SECONDS = 2.0
"""For which a job has to be nowhere: from a pop a worker takes less than one to name it, or leaves it."""
TAKEN_SECONDS = 6.0
"""For which a pop counts; heartbeats name by then what runs."""
AHEAD_SECONDS = 10.0
"""By which a time of what is due may lie ahead in Redis, whose clock may have been set back, as by a failover."""
RECENT_SECONDS = (1.0, 12.0)
"""Since jobs became due among which those without a coordinator are looked for; before that they are under way."""
COUNT_SECONDS = 5.0
"""Between two comparisons of the numbers."""
REST = 100
"""Jobs of all the others that one look compares."""
LOOK_SECONDS, PAUSE_SECONDS = 0.25, 0.1
"""A look at everything goes on for so long in a round, and for so long the worker has its loop for itself."""
OLDER_SECONDS = 1.0
"""By which a job has been due for longer than the head of the feed, to be looked for before all others: by more than it
takes to ask, or a wave that became due in one moment would seem to be all older than its first."""
MAX_MISSING = 20 * PAGE
"""Of which the look at everything waits until they are handed over: they take memory."""


class Sweep(NamedTuple):
    """A look at everything that was due when it began. What becomes due meanwhile is left: it might have no end."""

    due_by: datetime
    after: Row[Any] | None = None


class Reconciler(Loop):
    """Works only while this worker leads. `forgotten` is called when Redis does not remember what it was told.

    Each round looks at what is likely to be missing, and at what would be first, before it goes on with everything.
    """

    interval = 0.5

    def __init__(self, state: WorkerState, forgotten: Callable[[], None]) -> None:
        super().__init__(state)
        self._redis: Any = state.redis
        self._keys = state.keys
        self._forgotten = forgotten
        self._queued = QueuedJobs(state)
        self._epoch: int | None = None
        self._missing: dict[Key, float] = {}
        """Since when, on the monotonic clock; the longest first."""
        self._rest: Row[Any] | None = None
        """How far the look at all the others has come."""
        self._sweep: Sweep | None = None
        self._counted_at = float("-inf")
        self._handed_over = 0
        """Since it was last said."""

    async def round(self) -> float | None:
        began, now = time.monotonic(), self._state.clock.now()
        if not self._state.is_leader:
            self._epoch = self._sweep = None
            self._missing.clear()
            return None
        if await self._has_forgotten() or await self._has_too_few(now):
            ((due_by,),) = await self._state.read(select(func.now()))
            self._sweep = Sweep(due_by)
        await self._redis.zremrangebyscore(self._keys.taken, "-inf", now - TAKEN_SECONDS * 2000)
        async for page in self._pages(await self._head(now)):
            await self._compare(page, now)
        if self._handed_over:
            logger.warning("%d jobs were not to be found in Redis, and are handed over again", self._handed_over)
            self._handed_over = 0
        left = self._sweep or len(self._missing) > PAGE
        return PAUSE_SECONDS if left else max(PAUSE_SECONDS, self.interval - (time.monotonic() - began))

    async def _has_forgotten(self) -> bool:
        """Whether Redis does not remember what it was told at the last look: emptied, replaced, or an old file's."""
        least = self._epoch
        try:
            self._epoch = int(await self._redis.incr(self._keys.epoch))
            least = None if least is None else least + 1
        except OutOfMemoryError:
            self._epoch = int(await self._redis.get(self._keys.epoch) or 0)
        if least is not None and self._epoch >= least:
            return False
        self._forgotten()
        return True

    async def _has_too_few(self, now: int) -> bool:
        """Whether more jobs are due than Redis and the heartbeats know of.

        They are asked before the ledger: what ends in between is too many and not too few.
        """
        if self._sweep or time.monotonic() - self._counted_at < COUNT_SECONDS:
            return False
        self._counted_at = time.monotonic()
        fed = await self._redis.zcard(self._keys.feed)
        taken = await self._redis.zrangebyscore(self._keys.taken, now - TAKEN_SECONDS * 1000, "+inf")
        known = {taken_member(*key) for key in await self._held() | self._missing.keys()}
        known.update(member.decode() for member in taken)
        due = await self._queued.count(jobs.c.scheduled_at < _ago(RECENT_SECONDS[1]))
        return due > int(fed) + len(known)

    async def _head(self, now: int) -> tuple[int, float] | None:
        """The priority of what is first in the feed, and the seconds since it was due."""
        first = await self._redis.zrange(self._keys.feed, 0, 0, withscores=True)
        if not first:
            return None
        score = first[0][1]
        age = (now - due_of(score)) / 1000
        return 100 - rank_of(score), 0.0 if math.isnan(age) else min(max(age, 0.0), 10.0**9)

    async def _pages(self, head: tuple[int, float] | None) -> AsyncIterator[Sequence[Row[Any]]]:
        """What was missing, as far as it is queued still; what is likely to be missing; and a part of the rest."""
        until = time.monotonic() + LOOK_SECONDS
        ripe = bisect(list(self._missing.values()), time.monotonic() - MISSING_SECONDS)
        asked = list(self._missing)[: max(PAGE, ripe)]
        while asked:
            some, asked = asked[:PAGE], asked[PAGE:] if time.monotonic() < until else []
            wanted = jobs.c.id.in_([job_id for job_id, _ in some])
            page = await self._queued.ids(jobs.c.scheduled_at <= _ago(0.0), wanted)
            for key in set(some) - {(row.id, row.attempt) for row in page}:
                self._missing.pop(key, None)
            yield page
        last, first = RECENT_SECONDS
        due = jobs.c.scheduled_at <= _ago(last)
        if head is None:
            yield await self._queued.ids(due)
        else:
            priority, age = head
            older = jobs.c.scheduled_at < _ago(age + OLDER_SECONDS)
            yield await self._queued.ids(due, jobs.c.priority > priority)
            yield await self._queued.ids(due, jobs.c.priority == priority, older)
            yield await self._queued.ids(due, jobs.c.scheduled_at > _ago(first))
        if self._sweep is None:
            rest = await self._queued.ids(due, limit=REST, after=self._rest)
            self._rest = rest[-1] if len(rest) == REST else None
            yield rest
        while self._sweep and len(self._missing) < MAX_MISSING:
            page = await self._queued.ids(jobs.c.scheduled_at <= self._sweep.due_by, after=self._sweep.after)
            yield page
            self._sweep = Sweep(self._sweep.due_by, page[-1]) if page else None
            if time.monotonic() >= until:
                break

    async def _compare(self, page: Sequence[Row[Any]], now: int) -> None:
        """Hands over what was missing long enough."""
        async for rows in self._queued.rows(page):
            absent = {(row.id, row.attempt): row for row in rows}
            self._note_found(absent, await self._in_redis(rows, now))
            if absent:
                self._note_found(absent, await self._held())
            looked_at = time.monotonic()
            since = {key: self._missing.setdefault(key, looked_at) for key in absent}
            lost = [row for key, row in absent.items() if looked_at - since[key] >= MISSING_SECONDS]
            await self._state.hand_over(lost)
            self._handed_over += len(lost)
            for row in lost:
                del self._missing[row.id, row.attempt]

    def _note_found(self, absent: dict[Key, Row[Any]], found: set[Key]) -> None:
        for key in found & absent.keys():
            del absent[key]
            self._missing.pop(key, None)

    async def _in_redis(self, rows: Sequence[Row[Any]], now: int) -> set[Key]:
        """Those that are in the feed, or near it, or were popped just now."""
        texts = [Message.of(row).text() for row in rows]
        pipe = self._redis.pipeline(transaction=False)
        pipe.zmscore(self._keys.feed, texts)
        pipe.zmscore(self._keys.soon, [soon_member(text, row.priority) for text, row in zip(texts, rows, strict=True)])
        pipe.zmscore(self._keys.taken, [taken_member(row.id, row.attempt) for row in rows])
        feed, soon, taken = await pipe.execute()
        recent, ahead = now - TAKEN_SECONDS * 1000, now + AHEAD_SECONDS * 1000
        places = zip(rows, feed, soon, taken, strict=True)
        return {
            (row.id, row.attempt)
            for row, fed, near, at in places
            if fed is not None or (near is not None and near < ahead) or (at is not None and recent < at < ahead)
        }

    async def _held(self) -> set[Key]:
        """What any worker says it runs: of a dead one, too, as long as nobody has rescued it."""
        statement = select(workers.c.jobs).where(workers.c.queue == self._keys.queue)
        return {key for (told,) in await self._state.read(statement) for key in named(told)}


def _ago(seconds: float) -> Any:
    return func.now() - literal(timedelta(seconds=seconds))
