"""The bell: Redis publish/subscribe that says "look again" and never what has changed; losing it costs an interval."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

from coord.notify.client import close_client, own_client
from coord.notify.publisher import Publisher, notice
from coord.notify.subscriber import Subscriber

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from redis.asyncio import Redis

    from coord.notify.outage import Outage
    from coord.notify.publisher import Batch

REFUSAL_SECONDS = 10.0
"""How long what Redis has refused counts as refused, whatever else it does."""


class Bell:
    """Rings and hears channels of one Redis, by one connection to publish and one to subscribe, as `redis` makes them.

    A process hears only the channels it listens to. No method waits for Redis; without it they do nothing, which is
    said in the log once, and once when it is over.
    """

    def __init__(self, redis: Redis, outage: Outage) -> None:
        self._client = own_client(redis.connection_pool)
        self._outage = outage
        self._refused_until = 0.0
        """On the loop's clock."""
        self._publisher = Publisher(self._client, self._published)
        self._subscriber = Subscriber(self._client, self._heard)
        self.listen = self._subscriber.listen
        self.leave = self._subscriber.leave
        self.holds = self._publisher.holds

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Bell]:
        """Hear Redis until the block ends; what has been rung by then is still sent."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(close_client, self._client)
            await stack.enter_async_context(self._publisher.open())
            await stack.enter_async_context(self._subscriber.open())
            yield self

    @property
    def connected(self) -> bool:
        return self._subscriber.connected

    def ring(self, channels: Iterable[bytes], batch: Batch = MappingProxyType({})) -> None:
        """Publish soon, after the commands of the batch, in one round trip with whatever else there is by then."""
        self._publisher.publish({**batch, **{channel: [notice(channel)] for channel in channels}})

    def _published(self, error: Exception | None) -> None:
        """Commands of one kind may be refused while others are carried out: that is no end of it."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, ResponseError):
            self._refused_until = now + REFUSAL_SECONDS
        if error is not None or now >= self._refused_until:
            self._outage.report(error, "publisher")

    def _heard(self, error: Exception | None) -> None:
        self._outage.report(error, "subscriber", everybody=True)
