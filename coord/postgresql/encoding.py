"""What asyncpg would send for a prepared statement with its values, caught before it is sent.

Its encoders can be had only by running a statement, so one is run on a protocol of asyncpg's that leads nowhere.
"""

from __future__ import annotations

import asyncio
from struct import pack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import asyncpg
from asyncpg.protocol import NO_TIMEOUT, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpg.prepared_stmt import PreparedStatement

SYNC = b"S\0\0\0\4"


def message(kind: bytes, *parts: bytes) -> bytes:
    """One of PostgreSQL's protocol, either way."""
    content = b"".join(parts)
    return kind + pack("!i", 4 + len(content)) + content


BOUND = message(b"2")
_NOBODY = SimpleNamespace(user="", password=None, database="", server_settings=None)
_WELCOME = message(b"R", pack("!i", 0)) + message(b"Z", b"I")
_DONE = BOUND + message(b"C", b"INSERT 0 1\0") + message(b"Z", b"T")


class Encoder(asyncio.Transport):
    """For the statements of any connection; asyncpg holds their codecs with each."""

    def __init__(self) -> None:
        super().__init__()
        self._written: list[bytes] = []
        loop = asyncio.get_running_loop()
        self._protocol = Protocol(("", 0), loop.create_future(), _NOBODY, asyncpg.Record, loop)
        self._protocol.connection_made(self)
        self._protocol.data_received(_WELCOME)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._written.append(bytes(data))

    def run(self, statement: PreparedStatement[Any], values: Sequence[Any]) -> bytes:
        """The messages that run it, but for the Sync; asyncpg's own errors for values that do not fit."""
        self._written.clear()
        running = self._protocol.bind_execute(statement._state, values, "", 0, False, NO_TIMEOUT)
        running.send(None)  # it has written, and waits for the answer
        self._protocol.data_received(_DONE)
        try:
            running.send(None)
        except StopIteration:
            return b"".join(self._written).removesuffix(SYNC)
        raise AssertionError("asyncpg waits for more than the answer")
