"""The connection by which bells are rung and jobs handed over: packets go out as they come, answers are counted."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from redis.exceptions import ResponseError

from coord.hints.wire import Line, connected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable, Mapping

    from redis.asyncio import Redis
    from redis.asyncio.connection import Connection

LIMIT = 2.0
"""Seconds after which a ring is dropped that Redis has not answered."""
GAP = 0.004
"""Seconds between packets while several ring at once. Who rings alone is not kept waiting."""
PAUSE = 0.1
"""Seconds until Redis is tried again; what is rung meanwhile is sent then."""


class Packet(NamedTuple):
    """Commands, and how many lines Redis answers."""

    commands: bytes
    answers: int


if TYPE_CHECKING:
    Packets = Mapping[Hashable, Packet]
    """By what they are about, in order; of two about the same the later one counts."""


class Publisher:
    """Sends packets to one Redis by one connection, made for the first of them.

    What comes while an answer is awaited goes out together, so that the more comes, the more of it is sent at once.
    `told` is called with None when Redis has answered, else with what kept it from that; `before` before any is sent.
    """

    def __init__(
        self, redis: Redis, told: Callable[[Exception | None], None], *, before: Callable[[], None] = lambda: None
    ) -> None:
        self._redis = redis
        self._told = told
        self._before = before
        self._packets: dict[Hashable, Packet] = {}
        self._senders = 0
        """How often `send` was called for them."""
        self._line: _Line | None = None
        self._next = 0.0
        """When more may be sent, on the loop's clock."""
        self._wanted = asyncio.Event()
        """Whether there is something to connect for."""
        self._quiet = asyncio.Event()
        """Whether all that was rung is answered or dropped."""
        self._quiet.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Publisher]:
        """Publish until the block ends; what has been rung by then is still sent."""
        task = asyncio.create_task(self._run(), name="coord rings")
        try:
            yield self
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), LIMIT)
        finally:
            task.cancel()
            await asyncio.wait([task])

    def send(self, packets: Packets) -> None:
        """Send them at once, or soon and together with whatever else there is by then."""
        self._packets.update(packets)
        self._senders += 1
        if self._packets and self._quiet.is_set():
            self._quiet.clear()
            loop = asyncio.get_running_loop()
            if self._line is not None and loop.time() >= self._next:
                self._flush()
            else:
                loop.call_at(self._next, self._flush)

    def _flush(self) -> None:
        if self._line is None:
            self._wanted.set()
        elif self._packets and not self._line.sent:
            loop = asyncio.get_running_loop()
            self._next = loop.time() + GAP if self._senders > 1 else 0.0
            packets, self._packets, self._senders = self._packets, {}, 0
            self._before()
            self._line.send(packets)

    def holds(self, key: Hashable) -> bool:
        """Whether a packet is still to be sent, or Redis has not answered it."""
        return key in self._packets or (self._line is not None and key in self._line.sent)

    def _answered(self) -> None:
        self._told(None)
        if self._packets:
            asyncio.get_running_loop().call_at(self._next, self._flush)
        else:
            self._quiet.set()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            try:
                await self._publish()
            except Exception as error:  # noqa: BLE001 - rings are hints, and whatever is wrong the next ones are tried
                self._drop()
                self._told(error)
                await asyncio.sleep(PAUSE)

    def _drop(self) -> None:
        self._packets, self._senders = {}, 0
        self._wanted.clear()
        self._quiet.set()

    async def _publish(self) -> None:
        """By one connection until it is lost. Redis may close an idle one; what was under way then is sent again."""
        async with connected(self._redis.connection_pool, limit=LIMIT) as connection:
            self._line = line = _Line(connection, self._answered)
            try:
                self._wanted.clear()
                self._flush()
                await line.lost()
            finally:
                self._line = None
        self._packets = line.sent | self._packets
        if self._packets:
            self._wanted.set()


class _Line(Line):
    """Counts lines, which is all there is to read in the answers."""

    def __init__(self, connection: Connection, answered: Callable[[], None]) -> None:
        self.sent: dict[Hashable, Packet] = {}
        """What was sent together, until all of it is answered."""
        self._sent_at = 0.0
        self._unanswered = 0
        self._answered = answered
        self._useful = False
        """Whether Redis has ever answered here."""
        super().__init__(connection)

    def send(self, packets: dict[Hashable, Packet]) -> None:
        self.sent = packets
        self._sent_at = asyncio.get_running_loop().time()
        self._unanswered = sum(packet.answers for packet in packets.values())
        self.write(b"".join(packet.commands for packet in packets.values()))

    def data_received(self, data: bytes) -> None:
        if data.strip(b":+OK0123456789\r\n"):
            self.lose(ResponseError(data.strip().decode(errors="replace")))
            return
        self._unanswered -= data.count(b"\n")
        if self.sent and self._unanswered <= 0:
            self.sent = {}
            self._useful = True
            self._answered()

    def connection_lost(self, error: Exception | None) -> None:
        if self._useful:
            self.lose(None)
        super().connection_lost(error)

    async def lost(self) -> None:
        """Wait until it is; an error unless it had been of use before it was closed."""
        loop = asyncio.get_running_loop()
        while not self.end.done():
            await asyncio.wait([self.end], timeout=self._sent_at + LIMIT - loop.time() if self.sent else LIMIT)
            if self.sent and loop.time() >= self._sent_at + LIMIT:
                self.lose(TimeoutError(f"Redis has not answered for {LIMIT:g} s"))
        if error := self.end.result():
            raise error


def ring_of(channel: bytes) -> Packet:
    return Packet(b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$0\r\n\r\n" % (len(channel), channel), 1)
