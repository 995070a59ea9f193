"""A way to PostgreSQL that counts its answers, and that can be stopped: what is sent meanwhile arrives later."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Self

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
"""What a client asks first that wants TLS."""


def anonymous(protocol: ssl._SSLMethod) -> ssl.SSLContext:
    """TLS without a certificate, which is enough for a connection's bytes to go the way that they go in TLS."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")
    return context


class Proxy:
    """With `tls` it is also what encrypts, which the embedded PostgreSQL was not built for."""

    def __init__(self, url: str, *, at_once: int = 65_536, tls: bool = False) -> None:
        self._target = make_url(url)
        self._tls = anonymous(ssl.PROTOCOL_TLS_SERVER) if tls else None
        self._at_once = at_once
        """Bytes of an answer."""
        self.url = ""
        self.flows = asyncio.Event()
        """Stopped while this is not set."""
        self.flows.set()
        self.ends_later = 0.0
        """Seconds by which the end of a connection comes after the server's last words."""
        self.round_trips = 0
        """How often somebody had to wait for an answer."""
        self.stops_at = 0
        """Which of these answers it stops before; 0 is none."""
        self._asked = False
        self._open: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._lead, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = self._target.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        try:
            yield self
        finally:
            self.flows.set()
            server.close()
            self.cut()

    def cut(self) -> None:
        """End every connection."""
        for writer in self._open:
            writer.transport.abort()

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._tls is not None:
            assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
            writer.write(b"S")
            await writer.start_tls(self._tls)
        there, back = await asyncio.open_connection(self._target.host, self._target.port)
        self._open |= {writer, back}
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, back, asks=True), self._pump(there, writer, asks=False))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                self.round_trips += self._asked and not asks
                self._asked = asks
                if not asks and self.round_trips == self.stops_at:
                    self.flows.clear()
                    self.stops_at = 0
                await self.flows.wait()
                size = len(data) if asks else self._at_once
                for start in range(0, len(data), size):
                    writer.write(data[start : start + size])
                    await writer.drain()
                    await asyncio.sleep(0)
            if not asks:
                await asyncio.sleep(self.ends_later)
        writer.close()
