"""A way to PostgreSQL that counts its answers, and that can be stopped: what is sent meanwhile arrives later."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Proxy:
    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self.url = ""
        self.flows = asyncio.Event()
        """Stopped while this is not set."""
        self.flows.set()
        self.round_trips = 0
        """How often somebody had to wait for an answer."""
        self._asked = False
        self._open: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._lead, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = self._target.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        try:
            yield self
        finally:
            self.flows.set()
            server.close()
            for writer in self._open:
                writer.transport.abort()

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.host, self._target.port)
        self._open |= {writer, back}
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, back, asks=True), self._pump(there, writer, asks=False))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                self.round_trips += self._asked and not asks
                self._asked = asks
                await self.flows.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
