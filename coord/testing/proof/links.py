"""A link to a server, through a port of its own: it can be cut, and repaired."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Self

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHUNK = 65_536


class Link:
    """While it is not `up` who comes is thrown out."""

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._leading: set[asyncio.Task[None]] = set()
        self.up = True
        self.url = ""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._lead, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = self._target.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        try:
            yield self
        finally:
            server.close()
            self._cut()
            for task in self._leading:
                task.cancel()
            if self._leading:
                await asyncio.wait(self._leading)

    async def cut(self, seconds: float) -> None:
        self._cut()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.up = True

    def _cut(self) -> None:
        self.up = False
        for writer in self._writers:
            writer.transport.abort()

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends, task = {writer}, asyncio.current_task()
        assert task is not None
        self._leading.add(task)
        task.add_done_callback(self._leading.discard)
        try:
            if self.up:
                there, back = await asyncio.open_connection(self._target.host, self._target.port)
                ends.add(back)
                self._writers |= ends
                if self.up:  # or it was cut meanwhile
                    await asyncio.gather(_pump(reader, back), _pump(there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # the server is away, or this program ends
        finally:
            self._writers -= ends
            for each in ends:
                each.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()
