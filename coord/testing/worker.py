"""A worker in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from arq.worker import create_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from arq.worker import Worker


@asynccontextmanager
async def run_worker(settings: type) -> AsyncIterator[Worker]:
    """arq's worker of a class that `worker_settings` has made, in this event loop, until the block ends.

    It is entered when jobs are taken, and left when the worker has stopped as at a SIGTERM: running jobs have their
    `grace`. Needs the ledger's tables, Redis, and commits: rows of a transaction that is rolled back it does not see.

        async with Coordinator(session_maker, redis=coord_database.redis_url), run_worker(Settings):
            answer = await client.post("/orders")

    An exception that ends the worker is raised here.
    """
    if not hasattr(settings, "worker_config"):
        raise TypeError(f"settings is a class that worker_settings has made, not {settings!r}")
    started = asyncio.Event()
    given: Any = settings

    async def on_startup(ctx: dict[Any, Any]) -> None:
        try:
            await given.on_startup(ctx)
        except SystemExit as error:  # which would end the event loop, and the tests with it
            raise RuntimeError(f"the worker ends itself at its start: {error}") from error
        started.set()

    worker = create_worker(settings, on_startup=on_startup, handle_signals=False)
    running = asyncio.create_task(worker.async_run(), name="worker of the test")
    waiting = asyncio.create_task(started.wait())
    try:
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        yield worker
        if running.done():
            running.result()
    finally:
        waiting.cancel()
        await _stop(worker, running)


async def _stop(worker: Worker, running: asyncio.Task[None]) -> None:
    """As arq's own `run` ends when it is told to."""
    while not running.done():  # redis-py may swallow a cancellation
        running.cancel()
        await asyncio.wait([running], timeout=0.5)
    with contextlib.suppress(asyncio.CancelledError, Exception):
        running.result()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # arq closes its client so
        await worker.close()
