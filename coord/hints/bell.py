"""The bell: Redis publish/subscribe that says "look again" and never what has changed; losing it costs an interval."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from redis.exceptions import RedisError

from coord.hints.publisher import Publisher, ring_of
from coord.hints.wire import Wire, connected, packed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from redis.asyncio import Redis

    from coord.hints.outage import Outage
    from coord.hints.publisher import Packets

logger = logging.getLogger("coord.bell")

HEARTBEAT = 5.0
"""Seconds of silence after which Redis is asked whether it is there, and again after which it is taken for gone."""
LISTEN_LIMIT = 0.05
"""Seconds after which a row is looked at although Redis has not confirmed that its bell is heard."""
BACKOFF = (0.1, 2.0)
"""Seconds before the first and any later attempt to reach Redis again."""
BATCH = 1_000
"""Channels in one command."""
_PING = packed(b"PING")


class Listener(Protocol):
    """Whoever wants to hear a channel."""

    def listening(self) -> None:
        """The channel is heard from now on; what was rung before was not. Called again after an interruption."""

    def rung(self) -> None:
        """Somebody rang."""


class Bell:
    """Rings and hears channels of one Redis, by one connection to publish and one to subscribe.

    A process hears only the channels it listens to. No method waits for Redis; without it they do nothing, which is
    said in the log once, and once when it is over.
    """

    def __init__(self, redis: Redis, outage: Outage) -> None:
        self._redis = redis
        self._outage = outage
        self._listeners: dict[bytes, tuple[Listener, ...]] = {}
        self._unconfirmed: dict[bytes, None] = {}
        self._commands: dict[bytes, bool] = {}
        """Channels to subscribe to (true) or to leave, in order; the last word on a channel counts."""
        self._publisher = Publisher(redis, self._published, before=self._subscribe)
        self._wire: Wire | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Bell]:
        """Hear Redis until the block ends; what has been rung by then is still sent."""
        async with self._publisher.open():
            task = asyncio.create_task(self._hear(), name="coord bell")
            try:
                yield self
            finally:
                task.cancel()
                await asyncio.wait([task])

    @property
    def connected(self) -> bool:
        return self._wire is not None

    def ring(self, channels: Iterable[bytes], packets: Packets = MappingProxyType({})) -> None:
        """Publish at once or soon, after the packets, in one round trip with whatever else there is by then."""
        self._publisher.send({**packets, **{channel: ring_of(channel) for channel in channels}})

    def holds(self, key: object) -> bool:
        """Whether the packet is still to be sent, or Redis has not answered it."""
        return self._publisher.holds(key)

    def listen(self, channel: bytes, listener: Listener) -> None:
        """Have `listener` hear the channel. It is told when that is so, or soon in any case."""
        others = self._listeners.get(channel, ())
        self._listeners[channel] = (*others, listener)
        if others and channel not in self._unconfirmed:
            listener.listening()
            return
        self._unconfirmed[channel] = None
        self._command(channel, True)

    def leave(self, channel: bytes, listener: Listener) -> None:
        others = tuple(other for other in self._listeners.pop(channel, ()) if other != listener)
        if others:
            self._listeners[channel] = others
            return
        self._unconfirmed.pop(channel, None)
        self._command(channel, False)

    def _command(self, channel: bytes, wanted: bool) -> None:
        if self._wire is None:
            return  # whatever is in _listeners by then is subscribed to on connecting
        if not self._commands:
            asyncio.get_running_loop().call_soon(self._subscribe)
        self._commands.pop(channel, None)
        self._commands[channel] = wanted

    def _subscribe(self) -> None:
        """Send what there is of that: before any packet, whose consequences may have to be heard."""
        commands, self._commands = self._commands, {}
        if self._wire is None or not commands:
            return
        for name, wanted in ((b"SUBSCRIBE", True), (b"UNSUBSCRIBE", False)):
            _write(self._wire, name, [channel for channel, listen in commands.items() if listen is wanted])
        if any(commands.values()):
            asyncio.get_running_loop().call_later(LISTEN_LIMIT, self._tell_unconfirmed, list(commands))

    def _tell_unconfirmed(self, channels: Iterable[bytes]) -> None:
        for channel in channels:
            if channel in self._unconfirmed:
                self._tell_listening(channel)

    def _tell_listening(self, channel: bytes) -> None:
        for listener in self._listeners.get(channel, ()):
            listener.listening()

    async def _hear(self) -> None:
        wait, longest = BACKOFF
        while True:
            try:
                await self._hear_connection()
            except (RedisError, OSError) as error:
                self._outage.report(error)
            except Exception:
                logger.exception("The bell has failed and begins anew; waits go on by polling meanwhile")
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = BACKOFF[0] if not self._outage.lasts else min(2 * wait, longest)

    async def _hear_connection(self) -> None:
        async with connected(self._redis.connection_pool, limit=HEARTBEAT) as connection:
            self._wire = wire = Wire(connection, self._handle)
            try:
                self._commands.clear()
                self._unconfirmed = dict.fromkeys(self._listeners)
                _write(wire, b"SUBSCRIBE", list(self._listeners))
                wire.write(_PING)  # its answer says that all of this was allowed
                await _lost(wire)
            finally:
                self._wire = None
                self._tell_unconfirmed(list(self._unconfirmed))

    def _handle(self, message: list[Any] | bytes | RedisError) -> None:
        if isinstance(message, RedisError):
            raise message
        if not isinstance(message, list):  # the answer to PING while nothing is subscribed to
            self._outage.report(None)
            return
        kind, channel = message[0], message[1]
        if kind == b"message":
            for listener in self._listeners.get(channel, ()):
                listener.rung()
        elif kind == b"subscribe" and channel in self._unconfirmed:
            del self._unconfirmed[channel]
            self._tell_listening(channel)
        elif kind == b"pong":
            self._outage.report(None)

    def _published(self, error: Exception | None) -> None:
        if error is not None or (self._outage.lasts and self.connected):
            self._outage.report(error)


async def _lost(wire: Wire) -> None:
    """Wait until the connection is lost, and raise why; Redis is asked whether it is there when it says nothing."""
    loop = asyncio.get_running_loop()
    asked_at = 0.0
    while not wire.end.done():
        silent_since = max(wire.heard_at, asked_at)
        await asyncio.wait([wire.end], timeout=silent_since + HEARTBEAT - loop.time())
        if loop.time() < max(wire.heard_at, asked_at) + HEARTBEAT:
            continue
        if asked_at > wire.heard_at:
            raise TimeoutError(f"Redis has not answered for {HEARTBEAT:g} s")
        asked_at = loop.time()
        wire.write(_PING)
    if error := wire.end.result():
        raise error


def _write(wire: Wire, name: bytes, channels: Sequence[bytes]) -> None:
    for start in range(0, len(channels), BATCH):
        wire.write(packed(name, *channels[start : start + BATCH]))
