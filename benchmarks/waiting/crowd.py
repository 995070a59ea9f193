"""Many waiters in one process, each a task with a session of its own that has loaded its row."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TYPE_CHECKING

from benchmarks.waiting.stage import PATIENCE, Order

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from benchmarks.waiting.stage import Wait

INTERVAL = 0.5
BATCH = 100
"""Waiters that come at once."""


class Crowd:
    """One waiter for each order from 1 on, who waits again, with the same session, once all have been answered."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], wait: Wait) -> None:
        self._sessions = sessions
        self._wait = wait
        self._waiters: list[asyncio.Task[None]] = []
        self._waiting = 0
        self._answers: list[float] = []
        self._all_answered = asyncio.Event()
        self._error: Exception | None = None
        self._stirred = asyncio.Event()
        """Somebody began to wait, was answered, or failed."""

    @asynccontextmanager
    async def gathered(self, count: int) -> AsyncIterator[None]:
        """From when all of them wait."""
        try:
            for start in range(1, count + 1, BATCH):
                keys = range(start, min(start + BATCH, count + 1))
                self._waiters += [asyncio.create_task(self._attend(key)) for key in keys]
                await self._until(lambda: self._waiting == len(self._waiters))
            yield
        finally:
            for waiter in self._waiters:
                waiter.cancel()
            await asyncio.wait(self._waiters)

    async def answered(self, change: Awaitable[float]) -> list[float]:
        """Seconds from when `change` says that it was to the answer of each waiter, in order of their answers."""
        self._answers.clear()
        changed = await change
        await self._until(lambda: len(self._answers) == len(self._waiters))
        all_answered, self._all_answered = self._all_answered, asyncio.Event()
        all_answered.set()
        return [answer - changed for answer in self._answers]

    async def _attend(self, key: int) -> None:
        try:
            async with self._sessions() as session:
                order = await session.get_one(Order, key)
                await session.commit()
                self._waiting += 1
                self._stirred.set()
                while True:
                    order = await self._wait(session, order.id, INTERVAL)
                    self._answers.append(perf_counter())
                    self._stirred.set()
                    await self._all_answered.wait()
        except Exception as error:  # noqa: BLE001 - raised where the crowd is waited for
            self._error = error
            self._stirred.set()

    async def _until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not reached():
                if self._error is not None:
                    raise self._error
                self._stirred.clear()
                await self._stirred.wait()
