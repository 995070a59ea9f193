"""The subscriber: one connection, subscribed to every channel that has a listener, made anew whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Protocol

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from coord.notify.client import packed

logger = logging.getLogger("coord.bell")

PING_INTERVAL_SECONDS = 5.0
"""Without a message, after which Redis is sent a PING, and as long again after which the connection counts as lost."""
CONFIRM_TIMEOUT_SECONDS = 0.05
"""After which a listener is called although Redis has not confirmed the subscription."""
RECONNECT_PAUSE_SECONDS = (0.1, 2.0)
"""Before the first attempt to connect again, and before any later one at most."""
LEAVE_SECONDS = 0.1
"""Until a channel that nobody listens to is unsubscribed from, if there is nothing else to be said before."""
MAX_CHANNELS_PER_COMMAND = 1_000
MAX_MESSAGES_PER_STEP = 100
"""After which the event loop runs other tasks."""


class Listener(Protocol):
    """What is notified of a channel."""

    def subscribed(self) -> None:
        """Messages come from now on; earlier ones were missed. Called again after a lost connection."""

    def on_message(self) -> None:
        """A message was published."""


class Subscriber:
    """Subscribes to the channels that have listeners, and notifies these.

    No method waits for Redis. `on_result` is called with None when Redis has answered a PING, else with the error.
    """

    def __init__(self, connect: Callable[[], Connection], on_result: Callable[[Exception | None], None]) -> None:
        self._connect = connect
        self._on_result = on_result
        self._listeners: dict[bytes, tuple[Listener, ...]] = {}
        self._unconfirmed: dict[bytes, None] = {}
        self._told: dict[bytes, tuple[bytes, float]] = {}
        self._changes: dict[bytes, bool] = {}
        """Channels to subscribe to (true) or to unsubscribe from; the last call for a channel counts."""
        self._wanted = asyncio.Event()
        """Whether there is something to write, or the connection is lost."""
        self._received_at = self._pinged_at = 0.0
        """When something was last received, and when a PING was last sent, on the loop's clock."""
        self._pause = RECONNECT_PAUSE_SECONDS[0]
        self.connected = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Subscriber]:
        """Stay subscribed until the block ends."""
        task = asyncio.create_task(self._run(), name="coord subscriber")
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])

    def listen(self, channel: bytes, listener: Listener) -> None:
        """Notify `listener` of the channel's messages; `subscribed` is called on confirmation, or soon in any case."""
        others = self._listeners.get(channel, ())
        self._listeners[channel] = (*others, listener)
        if others and channel not in self._unconfirmed:
            listener.subscribed()
            return
        self._unconfirmed[channel] = None
        self._change(channel, True)

    def leave(self, channel: bytes, listener: Listener) -> None:
        others = tuple(other for other in self._listeners.pop(channel, ()) if other != listener)
        if others:
            self._listeners[channel] = others
            return
        self._unconfirmed.pop(channel, None)
        self._told.pop(channel, None)
        self._change(channel, False)

    def last_message(self, channel: bytes) -> tuple[bytes, float] | None:
        """The payload of the last message since somebody listens, and when it came, on the monotonic clock."""
        return self._told.get(channel)

    def _change(self, channel: bytes, wanted: bool) -> None:
        if not self.connected:
            return  # whatever is in _listeners by then is subscribed to on connecting
        if not wanted and not self._changes:
            asyncio.get_running_loop().call_later(LEAVE_SECONDS, self._wanted.set)
        self._changes[channel] = wanted
        if wanted:
            self._wanted.set()

    async def _run(self) -> None:
        while True:
            try:
                await self._serve()
            except (RedisError, OSError) as error:
                self._on_result(error)
            except Exception:
                logger.exception("The subscriber has failed and connects again; waits poll meanwhile")
            await asyncio.sleep(self._pause * random.uniform(0.5, 1))
            self._pause = min(2 * self._pause, RECONNECT_PAUSE_SECONDS[1])

    async def _serve(self) -> None:
        """By one connection until it is lost, which is an error; the next one subscribes to everything again."""
        connection = self._connect()
        reader = None
        try:
            await _bounded(connection.connect())  # type: ignore[no-untyped-call]
            self._begin()
            reader = asyncio.create_task(self._read(connection), name="coord subscriber reads")
            reader.add_done_callback(lambda _: self._wanted.set())
            await self._write(connection, reader)
        finally:
            self.connected = False
            self._confirm([*self._unconfirmed])
            if reader is not None:
                reader.cancel()
                await asyncio.wait([reader])
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    def _begin(self) -> None:
        self._unconfirmed = dict.fromkeys(self._listeners)
        self._changes = dict.fromkeys(self._listeners, True)
        self._received_at = asyncio.get_running_loop().time()
        self._pinged_at = 0.0
        self.connected = True

    async def _write(self, connection: Connection, reader: asyncio.Task[None]) -> None:
        """Whatever is to be written, until the reader ends."""
        await self._subscribe(connection)
        await self._ping(connection)  # its answer shows that all of the subscriptions were allowed
        while not reader.done():
            await self._wait_until(max(self._received_at, self._pinged_at) + PING_INTERVAL_SECONDS)
            if not reader.done():
                await self._subscribe(connection)
                await self._check(connection)
        reader.result()

    async def _wait_until(self, until: float) -> None:
        """For something to write, until a time on the loop's clock at the latest."""
        timer = asyncio.get_running_loop().call_at(until, self._wanted.set)
        try:
            await self._wanted.wait()
        finally:
            timer.cancel()
        self._wanted.clear()

    async def _subscribe(self, connection: Connection) -> None:
        """Send the changes that have gathered since the last time."""
        changes, self._changes = self._changes, {}
        for name, wanted in (("SUBSCRIBE", True), ("UNSUBSCRIBE", False)):
            channels = [channel for channel, is_wanted in changes.items() if is_wanted is wanted]
            for start in range(0, len(channels), MAX_CHANNELS_PER_COMMAND):
                await _say(connection, name, *channels[start : start + MAX_CHANNELS_PER_COMMAND])
        if any(changes.values()):
            asyncio.get_running_loop().call_later(CONFIRM_TIMEOUT_SECONDS, self._confirm, [*changes])

    async def _check(self, connection: Connection) -> None:
        """Send a PING after an interval without a message; `TimeoutError` if the last one was not answered."""
        if asyncio.get_running_loop().time() < max(self._received_at, self._pinged_at) + PING_INTERVAL_SECONDS:
            return
        if self._pinged_at > self._received_at:
            raise _no_answer()
        await self._ping(connection)

    async def _ping(self, connection: Connection) -> None:
        self._pinged_at = asyncio.get_running_loop().time()
        await _say(connection, "PING")

    async def _read(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for _ in range(MAX_MESSAGES_PER_STEP):
                answer = await connection.read_response()
                self._received_at = loop.time()
                self._on_answer(answer)
            await asyncio.sleep(0)  # redis-py does not wait for what has already come

    def _on_answer(self, answer: Any) -> None:
        match answer:
            case [b"message", channel, payload]:
                if listeners := self._listeners.get(channel):
                    self._told[channel] = payload, monotonic()
                    for listener in listeners:
                        _notify(listener.on_message)
            case [b"subscribe", channel, _]:
                self._on_subscribed(channel)
            case [b"pong", _] | b"PONG":  # with a subscription, and without one
                self._pause = RECONNECT_PAUSE_SECONDS[0]
                self._on_result(None)

    def _confirm(self, channels: Iterable[bytes]) -> None:
        """Call `subscribed` of the listeners of those channels that are not confirmed yet."""
        for channel in channels:
            if channel in self._unconfirmed:
                self._on_subscribed(channel)

    def _on_subscribed(self, channel: bytes) -> None:
        """Redis has confirmed it, or takes long: until it does messages are missed, so it is called again then."""
        self._unconfirmed.pop(channel, None)
        for listener in self._listeners.get(channel, ()):
            _notify(listener.subscribed)


def _notify(method: Callable[[], None]) -> None:
    try:
        method()
    except Exception:
        logger.exception("A listener has failed; the others are still notified")


async def _say(connection: Connection, *command: str | bytes) -> None:
    await _bounded(connection.send_packed_command(packed([command])))


async def _bounded(exchange: Any) -> None:
    try:
        async with asyncio.timeout(PING_INTERVAL_SECONDS):
            await exchange
    except TimeoutError:
        raise _no_answer() from None


def _no_answer() -> TimeoutError:
    return TimeoutError(f"Redis has not answered for {PING_INTERVAL_SECONDS:g} s")
