"""The reconciler: compares the ledger with Redis and the heartbeats, and hands over again what is nowhere.

It reads them in the order in which a job goes through them: ledger, feed, what was taken, heartbeats. Who is on its way
from one to the next is seen in one of them; what is missing in two looks, and was missing for longer than a worker may
take from a pop to its first sign, is nobody's.
"""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import OutOfMemoryError
from sqlalchemy import and_, func, literal, or_, select

from coord.jobs.model import jobs, workers
from coord.queue.handover import push
from coord.queue.keys import due_of, rank_of, soon_member, taken_member
from coord.queue.message import Message
from coord.worker.maintenance.loops import Loop
from coord.worker.maintenance.registry import named
from coord.worker.maintenance.rows import PAGE, QueuedJobs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from uuid import UUID

    from sqlalchemy import Row

    from coord.worker.state import WorkerState

    Key = tuple[UUID, int]

logger = logging.getLogger("arq.coord")

MISSING_SECONDS = 2.0
"""For which a job has to be nowhere: from a pop a worker takes less than one to name it, or leaves it."""
TAKEN_SECONDS = 6.0
"""For which a pop counts; heartbeats name by then what runs."""
RECENT_SECONDS = (1.0, 12.0)
"""Since jobs became due among which those without a coordinator are looked for; before that they are under way."""
COUNT_SECONDS = 5.0
"""Between two comparisons of the numbers."""
REST = 100
"""Jobs of all the others that one look compares."""


class Head(NamedTuple):
    """What is first in the feed."""

    priority: int
    age: float
    """Seconds since it was due."""


class Reconciler(Loop):
    """Works only while this worker leads. `forgotten` is called when Redis does not remember what it was told."""

    interval = 0.5
    limit = 60.0

    def __init__(self, state: WorkerState, forgotten: Callable[[], None]) -> None:
        super().__init__(state)
        self._redis: Any = state.redis
        self._keys = state.keys
        self._forgotten = forgotten
        self._queued = QueuedJobs(state)
        self._epoch: int | None = None
        self._missing: dict[Key, float] = {}
        """Since when, on the monotonic clock."""
        self._gone: set[Key] = set()
        """Those that were missing and are not queued any more."""
        self._rest: Row[Any] | None = None
        """How far the look at all the others has come."""
        self._counted_at = self._full_at = float("-inf")

    async def round(self) -> None:
        now = self._state.clock.now()
        if not self._state.is_leader:
            self._epoch = None
            self._missing.clear()
            return
        full = await self._has_forgotten() or await self._is_due_in_full()
        head = await self._head(now)
        seen: set[Key] = set()
        missing: dict[Key, float] = {}
        async for page in self._pages(head, full=full):
            async for rows in self._queued.rows(page):
                new = [row for row in rows if (row.id, row.attempt) not in seen]
                seen.update((row.id, row.attempt) for row in new)
                await self._compare(new, now, missing)
        # A look that is not full says nothing of what it has not compared.
        rest = {} if full else {key: since for key, since in self._missing.items() if key not in seen | self._gone}
        self._missing = rest | missing
        if full and missing:
            self._full_at = time.monotonic() + MISSING_SECONDS
        await self._redis.zremrangebyscore(self._keys.taken, "-inf", now - TAKEN_SECONDS * 2000)

    async def _has_forgotten(self) -> bool:
        """Whether Redis does not remember what it was told at the last look: emptied, replaced, or an old file's."""
        try:
            epoch = int(await self._redis.incr(self._keys.epoch))
        except OutOfMemoryError:
            epoch = int(await self._redis.get(self._keys.epoch) or 0) + 1
        last, self._epoch = self._epoch, epoch
        if last is not None and epoch > last:
            return False
        self._forgotten()
        return True

    async def _is_due_in_full(self) -> bool:
        """Also when there are more jobs than can be accounted for, or some were missing in the last full look."""
        now = time.monotonic()
        if self._full_at <= now and self._full_at > float("-inf"):
            self._full_at = float("-inf")
            return True
        if now - self._counted_at < COUNT_SECONDS:
            return False
        self._counted_at = now
        due = await self._queued.count(jobs.c.scheduled_at < _ago(RECENT_SECONDS[1]))
        return due > 0 and due > await self._redis.zcard(self._keys.feed) + len(await self._held()) + len(self._missing)

    async def _head(self, now: int) -> Head | None:
        first = await self._redis.zrange(self._keys.feed, 0, 0, withscores=True)
        if not first:
            return None
        score = first[0][1]
        age = (now - due_of(score)) / 1000
        return Head(100 - rank_of(score), 0.0 if math.isnan(age) else min(max(age, 0.0), 10.0**9))

    async def _pages(self, head: Head | None, *, full: bool) -> AsyncIterator[Sequence[Row[Any]]]:
        """What to look at: all that is due, or what is likely to be missing and a part of the rest."""
        due = jobs.c.scheduled_at <= _ago(0.0)
        if full:
            async for page in self._queued.pages():
                yield page
            return
        last, first = RECENT_SECONDS
        if head is None:
            yield await self._queued.ids(jobs.c.scheduled_at <= _ago(last))
            return
        yield await self._queued.ids(jobs.c.scheduled_at > _ago(first), jobs.c.scheduled_at <= _ago(last))
        yield await self._queued.ids(jobs.c.scheduled_at <= _ago(last), _before(head))
        if self._missing:
            asked = list(self._missing)[:PAGE]
            page = await self._queued.ids(due, jobs.c.id.in_([job_id for job_id, _ in asked]))
            self._gone = set(asked) if not page else {key for key in asked if key[0] not in {row.id for row in page}}
            yield page
        rest = await self._queued.ids(due, limit=REST, after=self._rest)
        self._rest = rest[-1] if len(rest) == REST else None
        yield rest

    async def _compare(self, rows: Sequence[Row[Any]], now: int, missing: dict[Key, float]) -> None:
        absent = [row for row in rows if row.id is not None]
        for find in (self._in_redis, self._in_heartbeats):
            if absent:
                there = await find(absent, now)
                absent = [row for row in absent if (row.id, row.attempt) not in there]
        seen_at = time.monotonic()
        lost = []
        for row in absent:
            key = (row.id, row.attempt)
            missing[key] = self._missing.get(key, seen_at)
            if seen_at - missing[key] >= MISSING_SECONDS:
                lost.append(row)
        if lost:
            logger.warning("%d jobs were not to be found in Redis, and are handed over again", len(lost))
            command = push(self._keys, [(row, float(row.remaining)) for row in lost])
            if command is not None:
                await self._redis.execute_command(*command)
            for row in lost:
                del missing[row.id, row.attempt]

    async def _in_redis(self, rows: Sequence[Row[Any]], now: int) -> set[Key]:
        """Those that are in the feed, or near it, or were popped just now."""
        texts = [Message.of(row).text() for row in rows]
        pipe = self._redis.pipeline(transaction=False)
        pipe.zmscore(self._keys.feed, texts)
        pipe.zmscore(self._keys.soon, [soon_member(text, row.priority) for text, row in zip(texts, rows, strict=True)])
        pipe.zmscore(self._keys.taken, [taken_member(row.id, row.attempt) for row in rows])
        feed, soon, taken = await pipe.execute()
        recent = now - TAKEN_SECONDS * 1000
        places = zip(rows, feed, soon, taken, strict=True)
        return {
            (row.id, row.attempt)
            for row, fed, near, at in places
            if fed is not None or near is not None or (at is not None and at > recent)
        }

    async def _in_heartbeats(self, _rows: Sequence[Row[Any]], _now: int) -> set[Key]:
        return await self._held()

    async def _held(self) -> set[Key]:
        """What any worker says it runs: of a dead one, too, as long as nobody has rescued it."""
        statement = select(workers.c.jobs).where(workers.c.queue == self._keys.queue)
        return {key for (told,) in await self._state.read(statement) for key in named(told)}


def _ago(seconds: float) -> Any:
    return func.now() - literal(timedelta(seconds=seconds))


def _before(head: Head) -> Any:
    """What would be first in the feed if it were there."""
    older = and_(jobs.c.priority == head.priority, jobs.c.scheduled_at < _ago(head.age + 0.1))
    return or_(jobs.c.priority > head.priority, older)
