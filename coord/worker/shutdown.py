"""Stopping a worker: running jobs get a grace, then give way to another worker, and no attempt is used up."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coord.worker.claims import Claim
    from coord.worker.pickup import Pickup

logger = logging.getLogger("arq.coord")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST = 5.0
"""Seconds that cancelled jobs may take to roll back."""


class Shutdown:
    """Handles SIGTERM and SIGINT, since arq would go on polling without a pause while its jobs finish."""

    pickup: Pickup | None = None
    """None until the worker has begun its shift: it can be told to stop before."""

    def __init__(self, *, grace: float) -> None:
        self._grace = grace
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def handle_signals(self, worker: asyncio.Task[Any]) -> None:
        """End `worker`, the task that arq's `Worker.main` is, when one comes; the second time without grace."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled, number, worker)

    def forget_signals(self) -> None:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _signalled(self, number: signal.Signals, worker: asyncio.Task[Any]) -> None:
        if self._task is not None:
            self._hurry.set()
            return
        running = self._running()
        logger.info("%s: stops, leaving %d running jobs %g s", number.name, len(running), self._grace)
        self._task = asyncio.create_task(self._stop(worker), name="coord shutdown")

    def _running(self) -> list[Claim]:
        return [] if self.pickup is None else self.pickup.claims.all()

    async def _stop(self, worker: asyncio.Task[Any]) -> None:
        if self.pickup is not None:
            self.pickup.drain()
            await self._ended(self._grace, self._hurry)
            for claim in self._running():
                if claim.task is not None:
                    claim.task.cancel()
            await self._ended(LAST)
            await self.pickup.flush()
        while not worker.done():  # redis-py may swallow a cancellation; see coord.notify.client
            worker.cancel()
            await asyncio.wait([worker], timeout=0.5)

    async def _ended(self, limit: float, hurry: asyncio.Event | None = None) -> None:
        """Return when no job runs any more, or the time is up, or somebody is in a hurry."""
        deadline = asyncio.get_running_loop().time() + limit
        while self._running() and asyncio.get_running_loop().time() < deadline:
            if hurry is not None and hurry.is_set():
                return
            await asyncio.sleep(0.02)
