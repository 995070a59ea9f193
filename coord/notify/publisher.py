"""The publisher: one task that sends Redis what has gathered, in one pipeline, whenever the last one is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextlib import asynccontextmanager, suppress
from time import monotonic

from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from coord.notify.client import ANSWER_TIMEOUT_SECONDS, Commands, exchange

Batch = Mapping[Hashable, Commands]
"""Commands by what they are about, in order; of two about the same the later ones count."""

PAUSE = 4
"""After a pipeline, times as long as it took, which a process or a Redis that is busy makes long."""
MAX_PAUSE_SECONDS = 0.02
OUTAGE_PAUSE_SECONDS = 0.1
"""Before the next attempt while Redis is away; what is published meanwhile is sent then."""


class Publisher:
    """Sends commands to one Redis. `publish` waits for nothing and reports nothing.

    What is published while an answer is awaited, or in the pause after it, is sent together: a pipeline costs nearly
    the same however many commands it has. The pause is the longer the more there is to do, and a lone command is not
    delayed. `on_result` is called with None when Redis has carried a pipeline out, else with the error.
    """

    def __init__(self, connection: Connection, on_result: Callable[[Exception | None], None]) -> None:
        self._connection = connection
        self._on_result = on_result
        self._pending: dict[Hashable, Commands] = {}
        self._sent: dict[Hashable, Commands] = {}
        """What was sent together, until all of it is answered."""
        self._is_proven = False
        """Whether Redis has answered since the last failure."""
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        """Whether all that was published is answered or dropped."""
        self._idle.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Publisher]:
        """Publish until the block ends; what has been published by then is still sent."""
        task = asyncio.create_task(self._run(), name="coord publisher")
        try:
            yield self
            with suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                    await self._idle.wait()
        finally:
            task.cancel()
            await asyncio.wait([task])
            await self._connection.disconnect(nowait=True)

    def publish(self, batch: Batch) -> None:
        """Send the commands soon, together with whatever else there is by then."""
        _add(self._pending, batch)
        if self._pending:
            self._idle.clear()
            self._wanted.set()

    def is_pending(self, key: Hashable) -> bool:
        """Whether commands about this are still to be sent, or Redis has not answered them."""
        return key in self._pending or key in self._sent

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            began = monotonic()
            await self._send()
            if not self._pending:
                self._wanted.clear()
                self._idle.set()
            await asyncio.sleep(min(PAUSE * (monotonic() - began), MAX_PAUSE_SECONDS))

    async def _send(self) -> None:
        self._sent, self._pending = self._pending, {}
        try:
            answers = await exchange(self._connection, [each for commands in self._sent.values() for each in commands])
        except Exception as error:  # noqa: BLE001 - these are hints, and whatever is wrong the next ones are tried
            await self._failed(error)
            return
        self._is_proven, self._sent = True, {}
        # What Redis refuses first; it carries out the other commands all the same.
        self._on_result(next((answer for answer in answers if isinstance(answer, ResponseError)), None))

    async def _failed(self, error: Exception) -> None:
        """A connection that has worked may have been closed for any reason: what it was sent is sent once more."""
        if self._is_proven and isinstance(error, RedisConnectionError):
            again, self._sent = self._sent, {}
            _add(again, self._pending)
            self._pending = again
            self._is_proven = False
            return
        self._is_proven, self._sent, self._pending = False, {}, {}
        self._on_result(error)
        await asyncio.sleep(OUTAGE_PAUSE_SECONDS)


def _add(batch: dict[Hashable, Commands], more: Batch) -> None:
    """The later ones go last: a notice must not be sent before the commands that it is about."""
    for key, commands in more.items():
        batch.pop(key, None)
        batch[key] = commands
