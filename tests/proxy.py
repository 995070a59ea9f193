"""A way to PostgreSQL that can be stopped: what is sent meanwhile arrives when it goes on."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from sqlalchemy import URL, make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Proxy:
    """Stopped while `flows` is not set."""

    def __init__(self, url: URL) -> None:
        self._target = url
        self.url = url
        self.flows = asyncio.Event()
        self.flows.set()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._lead, "127.0.0.1", 0)
        self.url = self._target.set(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
        try:
            yield self
        finally:
            self.flows.set()
            server.close()

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.host, self._target.port)
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                await self.flows.wait()
                sink.write(data)
        sink.close()


def proxy(url: str) -> contextlib.AbstractAsyncContextManager[Proxy]:
    return Proxy(make_url(url)).open()
