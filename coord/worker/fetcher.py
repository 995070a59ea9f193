"""The loop that takes jobs out of a queue's feed and starts them, as many as there are slots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Self
from uuid import UUID

from redis.exceptions import RedisError, ResponseError
from sqlalchemy import func, select, tuple_

from coord.jobs.model import is_queued, jobs
from coord.notify.client import Command, connector, exchange
from coord.queue.keys import due_of, rank_of, soon_prefix, taken_member
from coord.queue.message import Message
from coord.worker.executor import Executor
from coord.worker.failure import backoff
from coord.worker.maintenance.registry import WorkerRegistry
from coord.worker.state import WorkerState
from coord.worker.turns import Turns

Popped = Sequence[tuple[bytes, float]]
Found = tuple[Message, bytes, float]

logger = logging.getLogger("arq.coord")

BLOCK_SECONDS = 0.5
"""How long a pop waits for something to come. It is never cancelled: what it brought would be lost for seconds."""
IDLE_SECONDS = 0.5
"""Between two looks whether the worker may take something."""
SAY_SECONDS = 0.05
"""By which what is to be said may wait for a slot to become free, and for the pop that it then goes out with."""
BACKOFF_SECONDS = (0.1, 2.0)
"""Before the second attempt to reach Redis, and before any later one at most."""
LATE_SECONDS = 0.75
"""Since Redis may have answered, after which a popped job is not begun: it was on nobody's list meanwhile."""
BACK_SECONDS = 1.75
"""Since a pop was asked for, until which nobody else may have been given what it brought: less than MISSING_SECONDS."""
OLD_SECONDS = 10.0
"""Since a message was due, after which the ledger is asked whether it still holds."""
AHEAD_SECONDS = 1.0
"""By which Redis' time may seem to be ahead in a message, or else the ledger is asked: Redis' clock has been set."""
CHECK_SECONDS = 0.5
"""For the ledger to say which of the old messages still hold."""
LATER_MILLISECONDS = 500
"""After which a job that cannot be run here now is offered again."""


class Fetcher:
    """One loop, one command at a time; what it says of the last pop goes out with the next."""

    def __init__(self, state: WorkerState, executor: Executor, registry: WorkerRegistry, turns: Turns) -> None:
        self._state = state
        self._connection = connector(state.redis.connection_pool)()
        self._keys = state.keys
        self._running = state.running
        self._executor = executor
        self._registry = registry
        self._turns = turns
        self._commands: list[Command] = []
        """What is to be said with the next pop."""
        self._draining = False
        self._more = True
        """Whether the feed may have more than was popped: then nothing is waited for."""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="coord fetcher")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Return when the last pop has been answered, and what it brought is pushed back."""
        self.drain()
        assert self._task is not None
        await asyncio.wait([self._task])
        await self._connection.disconnect(nowait=True)

    def drain(self) -> None:
        """Take nothing any more."""
        self._draining = True
        self._running.changed.set()

    @property
    def _may_take(self) -> bool:
        return self._state.may_take and not self._draining

    def _report(self, error: BaseException | None) -> None:
        self._state.is_served = error is None
        self._state.outage.report(error, "fetcher")

    async def _run(self) -> None:
        failures = 0
        while not self._draining or self._commands:
            try:
                await self._round()
                failures = 0
            except (RedisError, OSError) as error:
                self._commands, self._more = [], True  # the reconciler finds what was to be pushed back
                self._report(error)
                failures += 1
                await asyncio.sleep(backoff(failures, BACKOFF_SECONDS))
            except Exception:
                logger.exception("The fetcher has failed, and goes on")
                self._commands = []
                await asyncio.sleep(BACKOFF_SECONDS[0])

    async def _round(self) -> None:
        self._running.changed.clear()
        free = self._running.free if self._may_take else 0
        if free <= 0 and await self._has_changed():
            return
        loop = asyncio.get_running_loop()
        asked = loop.time()
        begin_by = asked + LATE_SECONDS + (0.0 if self._more else BLOCK_SECONDS)
        popped = await self._exchange(free)
        if free <= 0:
            return
        self._more = bool(popped) and (len(popped) == free or (not self._more and len(self._running) > 0))
        checked = await self._checked(popped)
        if loop.time() > begin_by:
            self._put_back(checked, asked)
            return
        for message, raw, score in checked:
            self._start(message, raw, score)
        if checked:
            await asyncio.sleep(0)  # they claim first, and then the next pop is made

    def _put_back(self, found: Sequence[Found], asked: float) -> None:
        """What came too late to be begun goes back; or, if others may have it by now, is left to the reconciler."""
        if asyncio.get_running_loop().time() - asked < BACK_SECONDS:
            self._commands += [self._back(raw, score) for _, raw, score in found]
        elif found:
            logger.warning("%d jobs came too late to be begun here; they are handed over again", len(found))

    async def _has_changed(self) -> bool:
        """Wait until something ends here, or for a while; whether there is nothing to be said before the next look."""
        limit = IDLE_SECONDS if not self._commands else SAY_SECONDS if self._may_take else 0
        try:
            async with asyncio.timeout(limit):
                await self._running.changed.wait()
        except TimeoutError:
            if self._commands:
                return False
        self._more = True
        return True

    async def _exchange(self, free: int) -> Popped:
        """Say what there is to say, and pop for so many free slots."""
        commands, self._commands = self._commands, []
        if free > 0 and self._more:
            commands.append(("ZPOPMIN", self._keys.feed, free))
        elif free > 0:
            commands.append(("BZPOPMIN", self._keys.feed, BLOCK_SECONDS))
        answers = await exchange(self._connection, commands)
        self._report(next((answer for answer in answers if isinstance(answer, ResponseError)), None))
        popped = answers[-1] if free > 0 else None
        if isinstance(popped, ResponseError):
            raise popped
        found = (popped or [])[0 if self._more else 1 :]  # of a blocking pop the key comes first
        return [(raw, float(score)) for raw, score in zip(found[::2], found[1::2], strict=True)]

    async def _checked(self, popped: Popped) -> list[Found]:
        """Those that are messages, and that the ledger confirms if they are old or have to wait for their turn."""
        found = []
        for raw, score in popped:
            try:
                found.append((Message.read(raw), raw, score))
            except ValueError as error:
                logger.error("Something in the feed was dropped, it is %s", error)
        old = [message for message, _, score in found if self._is_old(score)]
        keyed = [message for message, _, _ in found if message.one_at_a_time is not None]
        if not old and not keyed:
            return found
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                stale = await self._stale(old) if old else set()
                if keyed:
                    stale |= {message.key for message in keyed} - await self._turns.admitted(keyed)
        except Exception as error:  # noqa: BLE001 - PostgreSQL is away: so is what the jobs want to do
            logger.debug("Old messages cannot be checked: %s", error)
            self._commands += [self._later(raw, score) for _, raw, score in found]
            await asyncio.sleep(BACKOFF_SECONDS[0])
            return []
        return [entry for entry in found if entry[0].key not in stale]

    def _is_old(self, score: float) -> bool:
        clock = self._state.clock
        since = clock.now() - due_of(score)  # which may be no number
        return not clock.is_set or not -AHEAD_SECONDS * 1000 <= since <= OLD_SECONDS * 1000

    async def _stale(self, messages: Sequence[Message]) -> set[tuple[UUID, int]]:
        """Those that the ledger does not want to be run, or not yet, or that another worker runs."""
        keys = [message.key for message in messages]
        due = jobs.c.scheduled_at <= func.clock_timestamp()
        wanted = select(jobs.c.id, jobs.c.attempt).where(is_queued, due, tuple_(jobs.c.id, jobs.c.attempt).in_(keys))
        queued = {(row.id, row.attempt) for row in await self._state.read(wanted)}
        return set(keys) - (queued - self._registry.held_elsewhere)

    def _start(self, message: Message, raw: bytes, score: float) -> None:
        if not self._may_take:
            self._commands.append(self._back(raw, score))
            return
        there = self._running.get(message.id)
        if there is not None and there.message.attempt >= message.attempt:
            return  # delivered twice
        if there is not None or (message.deaths and self._running.has_suspect) or self._running.free <= 0:
            self._commands.append(self._later(raw, score))
            return
        self._commands.append(("ZADD", self._keys.taken, self._state.clock.now(), taken_member(*message.key)))
        self._executor.start(message, queued=(self._state.clock.now() - due_of(score)) / 1000)

    def _back(self, raw: bytes, score: float) -> Command:
        return ("ZADD", self._keys.feed, "NX", repr(score), raw)

    def _later(self, raw: bytes, score: float) -> Command:
        due = self._state.clock.now() + LATER_MILLISECONDS
        return ("ZADD", self._keys.soon, due, soon_prefix(rank_of(score)).encode() + raw)
