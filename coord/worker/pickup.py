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
from coord.worker.claims import GONE, Claim, Claims
from coord.worker.scripts import give_back, take

if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from uuid import UUID

    from coord.worker.link import Link

logger = logging.getLogger("arq.coord")

POLL = 0.5
"""Seconds after which the queue is looked at although no bell rang, and arq gets to its own chores."""
BACKOFF = (0.1, 2.0)
"""Seconds before the first and any later attempt to reach Redis again."""
UNKNOWN_LIMIT = 900.0
"""Seconds after which a task that no worker has known is given up: a rolling deploy is over by then."""
UNKNOWN_PAUSE = (0.5, 30.0)


class Pickup:
    """The queue of one worker. arq is given no more than it starts, and nothing that it could not run."""

    def __init__(self, link: Link, claims: Claims, *, queue: str, worker: UUID, lease: float) -> None:
        self.claims = claims
        self.queue = queue
        self.known: Container[str] = ()
        """The tasks that this worker can run."""
        self.give_up: Callable[[Claim], None] = self.end
        """Told of a job whose task nobody has known for too long; it is to end the claim."""
        self._link = link
        self._worker = str(worker)
        self._lease = int(lease * 1000)
        self._stir = asyncio.Event()
        self._unknown: list[Claim] = []
        self._draining = False
        self._pause = 0.0
        self._next_due = 0.0
        self.polled = time.monotonic()
        """When arq last asked for work, on the system's monotonic clock."""

    def listening(self) -> None:
        """What was rung before this was not heard."""
        self._stir.set()

    rung = listening

    @property
    def bell(self) -> bytes:
        return queue_bell(self.queue)

    def drain(self) -> None:
        """Claim nothing any more."""
        self._draining = True
        self._stir.set()

    def end(self, claim: Claim, ending: str = GONE) -> None:
        """The claim's slot is free; Redis is told at once, with the next claims."""
        self.claims.end(claim, ending)
        self._stir.set()

    async def jobs(self, most: int) -> list[bytes]:
        """The ids of jobs claimed for arq, when there are some, or none when it is time for its chores."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + POLL
        self.polled = time.monotonic()
        while True:
            self._stir.clear()
            free = 0 if self._draining else min(self.claims.free, most)
            if (free > 0 or self.claims.has_ended) and (found := await self._exchange(free)):
                return found
            if (now := loop.time()) >= deadline:
                return []
            wake = min(deadline, self._next_due) if free > 0 else deadline
            await self._stirred(max(wake, now + self._pause))

    async def flush(self) -> None:
        """Tell Redis what has ended, claiming nothing."""
        if self.claims.has_ended:
            await self._exchange(0)

    async def _stirred(self, until: float) -> None:
        timer = asyncio.get_running_loop().call_at(until, self._stir.set)
        try:
            await self._stir.wait()
        finally:
            timer.cancel()

    async def _exchange(self, free: int) -> list[bytes]:
        ended = self.claims.take_ended()
        arguments = [part for claim in ended for part in (claim.id, claim.ending)]
        try:
            following, *found = await take.run(self._link, self.queue, self._worker, self._lease, free, *arguments)
        except (RedisError, OSError) as error:
            self.claims.restore_ended(ended)
            self._away(error)
            return []
        except BaseException:
            self.claims.restore_ended(ended)
            raise
        self._link.report(None)
        self._pause = 0.0
        self._next_due = asyncio.get_running_loop().time() + (int(following) / 1000 if int(following) >= 0 else POLL)
        triples = zip(found[::3], found[1::3], found[2::3], strict=True)
        taken = [id_ for id_, score, raw in triples if self._accept(id_.decode(), int(float(score)), raw)]
        await self._send_back()
        return taken

    def _away(self, error: Exception) -> None:
        self._link.report(error)
        self._pause = min(max(self._pause * 2, BACKOFF[0]), BACKOFF[1]) * random.uniform(0.75, 1.0)

    def _accept(self, id_: str, score: int, raw: bytes) -> bool:
        """Whether arq shall run it; otherwise it goes back."""
        job_id = id_of(id_)
        try:
            message = Message.read(raw)
        except ValueError as error:
            logger.error("Job %s was dropped, its message in Redis is garbled: %s", id_, error)
            self.end(Claim(id_, score))
            return False
        if message is None or job_id is None:
            self.claims.add(Claim(id_, score))
            return True
        claim = Claim(id_, score, message, job_id)
        if (running := self.claims.get(id_)) is not None:
            if running.message is not None and running.message.attempt < message.attempt:
                self.end(claim, "1000")  # the one that runs has lost its right to, and ends
            return False
        if message.task not in self.known:
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
                await give_back.run(self._link, self.queue, claim.id, self._worker, text, now + int(pause * 1000))
            except (RedisError, OSError) as error:
                self._away(error)
                self.end(claim, "1000")
