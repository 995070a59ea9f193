"""What went out ahead of the next statement, and whose answers asyncpg has not asked for."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import lru_cache
from struct import pack
from typing import Any

from coord.postgresql.encoding import BOUND, message

_ANY_TIME = b"NSA"
"""Notices, parameters that have changed and notifications belong to no statement."""
_ONE_ROW = message(b"C", b"INSERT 0 1\0")
BEGUN = message(b"1") + BOUND + message(b"C", b"BEGIN\0")
INSERTED = BOUND + _ONE_ROW


class Ahead(asyncio.Protocol):
    """Stands before asyncpg's protocol as long as the server owes answers to what was sent ahead."""

    def __init__(self, transport: Any, protocol: Any) -> None:
        self._transport = transport
        self._protocol = protocol
        self.owed = b""
        """What it will answer, byte for byte."""
        self._may_vary = deque[bool]()
        """Of each insert that is owed, whether a trigger or a rule may have made another number of its one row."""
        self.failures = 0
        """How often the answer was an error."""
        self._part = b""
        """Of a message, the rest of which is still to come."""
        self._asked = False
        """Whether asyncpg waits for an answer, or will within this step."""
        self._error = b""
        """What has failed, until asyncpg has asked something: before, it takes an error for the connection's end."""

    def begin(self, query: str) -> None:
        self._send(once(query), BEGUN)

    def insert(self, messages: bytes, *, may_vary: bool = False) -> None:
        self._may_vary.append(may_vary)
        self._send(messages, INSERTED)

    def _send(self, messages: bytes, answers: bytes) -> None:
        if not self.owed:
            self._transport.set_protocol(self)
        self.owed += answers
        self._transport.write(messages)

    def data_received(self, data: bytes) -> None:
        data, self._part = self._part + data, b""
        if not self._error and data.startswith(self.owed):
            self._step_aside(data[len(self.owed) :])
            return
        while len(data) >= 5 and len(data) >= (end := 1 + int.from_bytes(data[1:5])):
            answer, data = data[:end], data[end:]
            if answer[:1] in _ANY_TIME:
                self._protocol.data_received(answer)
            elif answer[:1] == b"E" and not self._asked:
                self._error = answer
            elif self._error or answer[:1] == b"E":
                self._step_aside(self._error + answer + data)
                return
            elif not self._is_owed(answer):
                # Somebody else has used the connection in between; whose answer is whose nobody knows any more.
                self._step_aside(b"")
                self._transport.abort()
                return
            elif not self.owed:
                self._step_aside(data)
                return
        self._part = data

    def _is_owed(self, answer: bytes) -> bool:
        """Then it is not any longer."""
        usual = answer if self.owed.startswith(answer) else b""
        if self.owed.startswith(_ONE_ROW) and self._may_vary.popleft() and answer[:1] == b"C":
            usual = _ONE_ROW
        self.owed = self.owed[len(usual) :]
        return usual != b""

    def ask(self) -> None:
        """asyncpg is about to send something, in this step of its task."""
        self._asked = True
        if self._error:
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        if self._error:
            self._step_aside(self._error)

    def _step_aside(self, rest: bytes) -> None:
        self.failures += rest.startswith(b"E")
        self.owed = self._error = b""
        self._may_vary.clear()
        self._asked = False
        self._transport.set_protocol(self._protocol)
        if rest:
            self._protocol.data_received(rest)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self.owed = self._error = b""
        self._protocol.connection_lost(error)


@lru_cache(maxsize=32)
def once(query: str) -> bytes:
    """A query without values, by the unnamed statement."""
    parse = message(b"P", b"\0", query.encode(), b"\0\0\0")
    return parse + message(b"B", b"\0\0", pack("!hhh", 0, 0, 0)) + message(b"E", b"\0", pack("!i", 0))
