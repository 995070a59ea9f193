"""Pick-up: arq asks for work in a loop, and is answered when there is some; one script ends and claims jobs."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from coord.jobs.feed import Message, id_of, queue_bell
from coord.worker.claims import GONE, LATER, Claim, Claims
from coord.worker.scripts import give_back, release, take

if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from uuid import UUID

    from coord.worker.link import Link

logger = logging.getLogger("arq.coord")

POLL = 0.5
"""Seconds after which the queue is looked at although no bell rang, and arq gets to its own chores."""
LEASE = 60.0
"""Seconds that a claim lasts, unless it is renewed."""
BACKOFF = (0.1, 2.0)
"""Seconds before the first and any later attempt to reach Redis again."""
HOLD = 0.05
"""Seconds that Redis is not told of a job that is over, to be told of it with the next claims, while slots are free."""
UNKNOWN_LIMIT = 900.0
"""Seconds after which a task that no worker has known is given up: a rolling deploy is over by then."""
UNKNOWN_PAUSE = (0.5, 30.0)


class Pickup:
    """The queue of one worker. arq is given no more than it starts, and nothing that it could not run."""

    def __init__(self, link: Link, claims: Claims, *, queue: str, worker: UUID) -> None:
        self.claims = claims
        self.queue = queue
        self.worker = str(worker)
        self.known: Container[str] = ()
        """The tasks that this worker can run."""
        self.give_up: Callable[[Claim], None] = self.end
        """Told of a job whose task nobody has known for too long; it is to end the claim."""
        self.is_alive: Callable[[], bool] = lambda: True
        """Whether others know that this worker lives. Who cannot say so claims nothing: it would be taken away."""
        self.draining = False
        self.polled = time.monotonic()
        """When arq last asked for work, on the system's monotonic clock."""
        self._link = link
        self._lease = int(LEASE * 1000)
        self._stir = asyncio.Event()
        self._may_have = True
        """Whether the queue may have more than was found in it."""
        self._tell_at = 0.0
        """When Redis is to be told of what has ended, on the loop's clock."""
        self._unknown: list[Claim] = []
        self._pause = 0.0
        self._next_due = 0.0

    def rung(self) -> None:
        """Somebody has handed a job over; who has no slot for it looks when one is free."""
        self._may_have = True
        if self.claims.free > 0:
            self._stir.set()

    listening = rung
    """What was rung before this was not heard."""

    @property
    def bell(self) -> bytes:
        return queue_bell(self.queue)

    def drain(self) -> None:
        """Claim nothing any more."""
        self.draining = True
        self._stir.set()

    def end(self, claim: Claim, ending: str = GONE) -> None:
        """The claim's slot is free; Redis is told with the next claims, or soon without any."""
        now = asyncio.get_running_loop().time()
        if ending != GONE:
            self._tell_at = now
        elif not self.claims.has_ended:
            self._tell_at = now + HOLD
        self.claims.end(claim, ending)
        self._stir.set()

    async def jobs(self, most: int) -> list[bytes]:
        """The ids of jobs claimed for arq, when there are some, or none when it is time for its chores."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + POLL
        self.polled = time.monotonic()
        while True:
            self._stir.clear()
            free = min(self.claims.free, most) if not self.draining and self.is_alive() else 0
            now = loop.time()
            claims = free > 0 and (self._may_have or now >= self._next_due)
            if (claims or (self.claims.has_ended and now >= self._tell_at)) and (found := await self._exchange(free)):
                return found
            wake = min(deadline, self._next_due) if free > 0 else deadline
            if free > 0 and self._may_have:
                wake = now
            if self.claims.has_ended:
                wake = min(wake, self._tell_at)
            await self._stirred(max(wake, loop.time() + self._pause))
            if loop.time() >= deadline:
                self._may_have = True  # no bell is sure to be heard
                return []  # to be asked again at once

    async def flush(self) -> None:
        """Tell Redis what has ended, claiming nothing."""
        if self.claims.has_ended:
            await self._exchange(0)

    async def leave(self) -> None:
        """Give back what is left when nothing runs any more: what was never begun, or came with a lost answer."""
        self.drain()
        await self.flush()
        try:
            await release.run(self._link, self.queue, self.worker, self._lease)
        except (RedisError, OSError) as error:
            self._away(error)

    async def _stirred(self, until: float) -> None:
        timer = asyncio.get_running_loop().call_at(until, self._stir.set)
        try:
            await self._stir.wait()
        finally:
            timer.cancel()

    async def _exchange(self, free: int) -> list[bytes]:
        ended = self.claims.take_ended()
        self._may_have = self._may_have and not free  # unless a bell rings meanwhile
        told = [part for claim in ended for part in (_raw(claim.id), claim.ending, _attempt(claim))]
        try:
            following, *found = await take.run(self._link, self.queue, self.worker, self._lease, free, *told)
        except (RedisError, OSError) as error:
            self.claims.restore_ended(ended)
            self._away(error)
            return []
        except BaseException:
            self.claims.restore_ended(ended)
            raise
        self._link.report(None)
        self._pause = 0.0
        if free > 0:
            wait = float(following) / 1000
            self._next_due = asyncio.get_running_loop().time() + (wait if wait >= 0 else POLL)
            self._may_have = self._may_have or len(found) == 3 * free
        triples = zip(found[::3], found[1::3], found[2::3], strict=True)
        taken = [id_ for id_, score, raw in triples if self._accept(id_, score, raw)]
        await self._send_back()
        return taken

    def _away(self, error: Exception) -> None:
        self._may_have = True
        self._link.report(error)
        self._pause = min(max(self._pause * 2, BACKOFF[0]), BACKOFF[1]) * random.uniform(0.75, 1.0)

    def _accept(self, raw_id: bytes, score: bytes, raw: bytes) -> bool:
        """Whether arq shall run it; otherwise it goes back."""
        id_ = raw_id.decode(errors="surrogateescape")
        # By this process's clock, which arq goes by, it may not be due yet; it would be left lying.
        claim = Claim(id_, int(min(max(float(score), 1), time.time() * 1000)))
        try:
            claim.job_id = id_of(id_)
            claim.message = None if claim.job_id is None else Message.read(raw)
            raw_id.decode()
        except ValueError as error:
            logger.error("Job %r was dropped, its message in Redis is garbled: %s", id_, error)
            self.end(claim)
            return False
        if (running := self.claims.get(id_)) is not None:
            if _attempt(running) < _attempt(claim):
                self.end(claim, LATER)  # the one that runs has lost its right to, and ends
            return False
        if claim.message is not None and claim.message.task not in self.known:
            self._unknown.append(claim)
            return False
        self.claims.add(claim)
        return True

    async def _send_back(self) -> None:
        """Tasks that this worker does not know: another may, or this one after its deployment."""
        unknown, self._unknown = self._unknown, []
        now = time.time_ns() // 1_000_000
        for claim in unknown:
            assert claim.message is not None
            since = claim.message.unknown_since or now
            if now - since > UNKNOWN_LIMIT * 1000:
                self.claims.add(claim)
                self.give_up(claim)
                continue
            if since == now:
                logger.warning("Task %s is not known here; job %s goes back", claim.message.task, claim.id)
            pause = min(max((now - since) / 2000, UNKNOWN_PAUSE[0]), UNKNOWN_PAUSE[1]) * random.uniform(0.75, 1.0)
            text = replace(claim.message, unknown_since=since).text()
            try:
                await give_back.run(self._link, self.queue, claim.id, self.worker, text, now + int(pause * 1000))
            except (RedisError, OSError) as error:
                self._away(error)
                self.end(claim, LATER)


def _raw(id_: str) -> bytes:
    return id_.encode(errors="surrogateescape")


def _attempt(claim: Claim) -> int:
    return 0 if claim.message is None else claim.message.attempt
