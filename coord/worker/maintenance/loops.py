"""The shape of what a worker does beside its jobs: one task, whose rounds may fail and go on."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Self

from redis.exceptions import RedisError, ResponseError

from coord.retryable import is_retryable
from coord.worker.state import WorkerState

logger = logging.getLogger("arq.coord")

ROUND_SECONDS = 10.0
"""After which a round is given up: a server may be gone without a word."""
LAST_ROUND_SECONDS = 3.0
"""For the last round to end by itself: to cancel a statement may cost a connection."""


class Loop(ABC):
    """Runs `round` until the block ends, and again `interval` seconds after each or when it is woken."""

    interval = 1.0
    limit = ROUND_SECONDS

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._task: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._ending = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=f"coord {type(self).__name__}")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._ending = True
        self.wake()
        await asyncio.wait([self._task], timeout=LAST_ROUND_SECONDS)
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=LAST_ROUND_SECONDS)

    def wake(self) -> None:
        """Begin the next round now."""
        self._woken.set()

    @abstractmethod
    async def round(self) -> float | None:
        """One round; the seconds until the next one, if they are not `interval`."""

    def failed(self, error: Exception) -> None:
        """Told of a round that has failed; the next one is tried in any case."""
        if isinstance(error, ResponseError):
            self._state.outage.report(error, type(self).__name__)
        elif isinstance(error, RedisError) or is_retryable(error):
            logger.debug("%s goes on after: %s", type(self).__name__, error)
        else:
            logger.error("%s has failed, and goes on", type(self).__name__, exc_info=error)

    async def _run(self) -> None:
        while not self._ending:
            self._woken.clear()
            pause: float | None = None
            try:
                async with asyncio.timeout(self.limit):
                    pause = await self.round()
                self._state.outage.report(None, type(self).__name__)
            except Exception as error:  # noqa: BLE001 - whatever it is, the loop goes on
                self.failed(error)
            timer = asyncio.get_running_loop().call_later(self.interval if pause is None else pause, self.wake)
            try:
                if not self._ending:
                    await self._woken.wait()
            finally:
                timer.cancel()
