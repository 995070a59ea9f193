"""Applications on a real socket: in-process clients buffer bodies, hide late commits and invent disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from sqlalchemy.pool import QueuePool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine


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
            async with httpx.AsyncClient(base_url=url, timeout=30, **client_options) as client:
                yield client
        finally:
            server.should_exit = True
            await task


async def eventually(condition: Any, *, within: float = 5.0, message: str = "") -> Any:
    """The first true result of `condition`, which may be asynchronous, looked at again until the time is up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    while True:
        result = condition()
        if isawaitable(result):
            result = await result
        if result:
            return result
        if loop.time() > deadline:
            raise AssertionError(message or f"not true within {within} s, last seen: {result!r}")
        await asyncio.sleep(0.01)


async def all_given_back(engine: AsyncEngine, *, within: float = 5.0) -> None:
    """Every connection of its pool; a shared read that is under way when its last wait ends does so a little later."""
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    await eventually(lambda: pool.checkedout() == 0, within=within)
