"""One request by hand: slow bodies, sudden ends, and answers that are looked at as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


@dataclass
class Event:
    """A server-sent event."""

    id: str = ""
    name: str = "message"
    data: Any = None


@dataclass
class Call:
    """A connection of its own, on which something was sent, whole or not."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def begun(self, within: float = 20.0) -> Call:
        """Wait for the status and the headers."""
        async with asyncio.timeout(within):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return self

    async def text(self, within: float = 20.0) -> str:
        """The next chunk of the body, or an empty text at its end; `IncompleteReadError` if it was cut."""
        async with asyncio.timeout(within):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            return (await self.reader.readexactly(size + 2))[:-2].decode()

    async def json(self) -> Any:
        return json.loads(await self.reader.readexactly(int(self.headers["content-length"])))

    async def event(self, within: float = 20.0) -> Event | None:
        """The next event, past comments; None at the end of the stream."""
        while chunk := await self.text(within):
            event = Event()
            for line in chunk.strip().split("\n"):
                key, _, value = line.partition(": ")
                match key:
                    case "id":
                        event.id = value
                    case "event":
                        event.name = value
                    case "data":
                        event.data = json.loads(value)
            if event.data is not None:
                return event
        return None

    async def events(self) -> AsyncIterator[Event]:
        """Until the stream ends."""
        while (event := await self.event()) is not None:
            yield event

    def leave(self) -> None:
        """Without a word: the server sees a reset."""
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def call(
    url: str, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> AsyncIterator[Call]:
    address = urlsplit(str(url))
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    fields = {"Host": address.netloc, **({"Content-Length": str(len(body))} if body else {}), **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    made = Call(reader, writer)
    try:
        await made.send("\r\n".join(lines).encode("latin-1") + body)
        yield made
    finally:
        writer.transport.abort()
