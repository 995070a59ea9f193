"""Applications on a real socket: in-process clients buffer bodies, hide late commits and invent disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import QueuePool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

MAX_PAUSE_SECONDS = 0.05
"""Between two looks for what is waited for."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def served(app: Any, **client_options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, which uvicorn serves in this event loop until the block ends."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        server = _Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=5))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            options = {"verify": False, "trust_env": False, **client_options}  # to read certificates takes its time
            async with httpx.AsyncClient(base_url=url, timeout=30, **options) as client:
                yield client
        finally:
            server.should_exit = True
            await task


async def eventually(condition: Any, *, within: float = 5.0, message: str = "") -> Any:
    """The first true result of `condition`, which may be asynchronous, looked at again until the time is up.

    Ever less often: most looks are statements, which on a busy machine keep from happening what is looked for.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    pause = 0.005
    while True:
        result = condition()
        if isawaitable(result):
            result = await result
        if result:
            return result
        if loop.time() > deadline:
            raise AssertionError(message or f"not true within {within} s, last seen: {result!r}")
        await asyncio.sleep(pause)
        pause = min(1.2 * pause, MAX_PAUSE_SECONDS)


@contextlib.asynccontextmanager
async def engine_at(url: str | URL, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine that has no connection any more when the block ends."""
    engine = create_async_engine(url, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


async def all_given_back(engine: AsyncEngine, *, within: float = 5.0) -> None:
    """Every connection of its pool; a shared read that is under way when its last wait ends does so a little later."""
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    await eventually(lambda: pool.checkedout() == 0, within=within)
