"""The bell: Redis publish/subscribe that says "read again" and never what has changed; losing it costs an interval."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from coord.notify.client import connector
from coord.notify.outage import Outage
from coord.notify.publisher import Batch, Publisher
from coord.notify.subscriber import Subscriber

REFUSAL_SECONDS = 10.0
"""How long a command that Redis has refused counts as a failure, although it carries out others."""


class Bell:
    """Publishes and subscribes to channels of one Redis, by one connection for each, as `redis` makes them.

    A process receives only the channels that it has listeners for. No method waits for Redis; while it is away they do
    nothing, which is logged once, and once when it is back.
    """

    def __init__(self, redis: Redis, outage: Outage) -> None:
        connect = connector(redis.connection_pool)
        self._outage = outage
        self._refused_until = 0.0
        """On the loop's clock."""
        self._publisher = Publisher(connect(), self._on_publisher_result)
        self._subscriber = Subscriber(connect, partial(outage.report, of="subscriber", everybody=True))
        self.listen = self._subscriber.listen
        self.leave = self._subscriber.leave
        self.last_message = self._subscriber.last_message
        self.is_pending = self._publisher.is_pending

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Bell]:
        """Publish and subscribe until the block ends; what has been published by then is still sent."""
        async with self._publisher.open(), self._subscriber.open():
            yield self

    @property
    def connected(self) -> bool:
        return self._subscriber.connected

    def publish(self, channels: Iterable[bytes], batch: Batch = MappingProxyType({}), payload: bytes = b"") -> None:
        """Send soon, after the batch, in one round trip with whatever else there is; the payload is for diagnosis."""
        self._publisher.publish({**batch, **{channel: [("PUBLISH", channel, payload)] for channel in channels}})

    def _on_publisher_result(self, error: Exception | None) -> None:
        """Redis may refuse commands of one kind and carry out others: success of these does not end the outage."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, ResponseError):
            self._refused_until = now + REFUSAL_SECONDS
        if error is not None or now >= self._refused_until:
            self._outage.report(error, "publisher")
