"""A way to a server that counts its answers, and does to them what a network does: late, lost, cut or reset."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


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


@dataclass(eq=False, slots=True)
class Wire:
    """One connection that was led on."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_dead: bool = False
    """Whatever is sent either way is gone, for good, and neither end is told."""

    @property
    def port(self) -> int:
        """By which the server knows it: `client_port` of `pg_stat_activity`."""
        port: int = self.server.get_extra_info("sockname")[1]
        return port

    def cut(self) -> None:
        """The client is told so; the server reads what it was sent, and is told then."""
        self.client.transport.abort()
        self.server.close()

    def reset(self) -> None:
        """Both ends are sent an RST."""
        for writer in (self.client, self.server):
            end = writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """With `tls` it is also what encrypts, which the embedded PostgreSQL was not built for."""

    def __init__(self, url: str, *, at_once: int = 65_536, tls: bool = False) -> None:
        self.target = make_url(url)
        """Where new connections are led."""
        self._tls = anonymous(ssl.PROTOCOL_TLS_SERVER) if tls else None
        self._at_once = at_once
        """Bytes of an answer."""
        self.url = ""
        self.flows = asyncio.Event()
        """Stopped while this is not set."""
        self.flows.set()
        self.ends_later = 0.0
        """Seconds by which the end of a connection comes after the server's last words."""
        self.answers_later = 0.0
        """Seconds by which each answer comes late."""
        self.on_request: Callable[[Wire, bytes], bool] | None = None
        """Called with what a client sends, before it is sent on; it is not if that returns true."""
        self.on_answer: Callable[[Wire, bytes], bool] | None = None
        """The same, of what a server sends."""
        self.round_trips = 0
        """How often somebody had to wait for an answer."""
        self.stops_at = 0
        """Which of these answers it stops before; 0 is none."""
        self._asked = False
        self._swallows = False
        self.wires: set[Wire] = set()
        """That are open."""

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._lead, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = self.target.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        try:
            yield self
        finally:
            self.flows.set()
            server.close()
            self.cut()

    def cut(self) -> None:
        """End every connection."""
        for wire in self.wires:
            wire.client.transport.abort()
            wire.server.transport.abort()

    def reset(self) -> None:
        for wire in self.wires:
            wire.reset()

    def lose_everything(self) -> None:
        """From now on, until `lead_again`: packets vanish, and whoever connects is answered nothing."""
        self._swallows = True
        for wire in self.wires:
            wire.is_dead = True

    def lead_again(self) -> None:
        """New connections; those from before are as dead as ever."""
        self._swallows = False

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._tls is not None:
            assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
            writer.write(b"S")
            await writer.start_tls(self._tls)
        there, back = await asyncio.open_connection(self.target.host, self.target.port)
        wire = Wire(writer, back, self._swallows)
        self.wires.add(wire)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(self._pump(reader, wire, asks=True), self._pump(there, wire, asks=False))
        finally:
            self.wires.discard(wire)
            writer.close()
            back.close()

    async def _pump(self, reader: asyncio.StreamReader, wire: Wire, *, asks: bool) -> None:
        writer, trap = (wire.server, "on_request") if asks else (wire.client, "on_answer")
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                self.round_trips += self._asked and not asks
                self._asked = asks
                if not asks and self.round_trips == self.stops_at:
                    self.flows.clear()
                    self.stops_at = 0
                await self.flows.wait()
                if not asks and self.answers_later:
                    await asyncio.sleep(self.answers_later)
                sprung = getattr(self, trap)
                if wire.is_dead or (sprung is not None and sprung(wire, data)):
                    continue
                await self._write(data, writer, len(data) if asks else self._at_once)
            if not asks:
                await asyncio.sleep(self.ends_later)
        if not wire.is_dead:
            writer.close()

    async def _write(self, data: bytes, writer: asyncio.StreamWriter, size: int) -> None:
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
