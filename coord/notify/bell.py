"""The bell: Redis publish/subscribe that says "read again" and never what has changed; losing it costs an interval."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import RedisError, ResponseError

from coord.notify.publisher import Publisher, notice
from coord.notify.subscriber import Subscriber

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from coord.notify.outage import Outage
    from coord.notify.publisher import Batch

REFUSAL_SECONDS = 10.0
"""How long a command that Redis has refused counts as a failure, although it carries out others."""

CONNECT_TIMEOUT_SECONDS = 2.0

# Who uses the client bounds each exchange. `socket_timeout` would do so by `asyncio.wait_for`, which before Python 3.12
# may swallow a cancellation (python/cpython#86296): a task that is cancelled to close would never end.
_OWN: dict[str, Any] = {
    "socket_timeout": None,
    "health_check_interval": 0,
    "retry": None,
    "retry_on_timeout": False,
    "decode_responses": False,
    "protocol": 2,
}


class Bell:
    """Publishes and subscribes to channels of one Redis, by one connection for each, as `redis` makes them.

    A process receives only the channels that it has listeners for. No method waits for Redis; while it is away they do
    nothing, which is logged once, and once when it is back.
    """

    def __init__(self, redis: Redis, outage: Outage) -> None:
        self._client = own_client(redis.connection_pool)
        self._outage = outage
        self._refused_until = 0.0
        """On the loop's clock."""
        self._publisher = Publisher(self._client, self._on_publisher_result)
        self._subscriber = Subscriber(self._client, self._on_subscriber_result)
        self.listen = self._subscriber.listen
        self.leave = self._subscriber.leave
        self.told = self._subscriber.told
        self.is_pending = self._publisher.is_pending

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Bell]:
        """Publish and subscribe until the block ends; what has been published by then is still sent."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(close_client, self._client)
            await stack.enter_async_context(self._publisher.open())
            await stack.enter_async_context(self._subscriber.open())
            yield self

    @property
    def connected(self) -> bool:
        return self._subscriber.connected

    def publish(self, channels: Iterable[bytes], batch: Batch = MappingProxyType({}), payload: bytes = b"") -> None:
        """Send soon, after the commands of the batch, in one round trip with whatever else there is by then."""
        self._publisher.publish({**batch, **{channel: [notice(channel, payload)] for channel in channels}})

    def _on_publisher_result(self, error: Exception | None) -> None:
        """Redis may refuse commands of one kind and carry out others: success of these does not end the outage."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, ResponseError):
            self._refused_until = now + REFUSAL_SECONDS
        if error is not None or now >= self._refused_until:
            self._outage.report(error, "publisher")

    def _on_subscriber_result(self, error: Exception | None) -> None:
        self._outage.report(error, "subscriber", everybody=True)


def own_client(pool: ConnectionPool) -> Redis:
    """Connects to where the pool does, in a pool of its own; no retries, no limits, answers are bytes.

    Redis-py closes a connection on which a command was cancelled, and looks at an idle one before it is used again.
    """
    options = {"socket_connect_timeout": CONNECT_TIMEOUT_SECONDS, **pool.connection_kwargs, **_OWN}
    options["retry_on_error"] = []  # redis-py adds to it
    return Redis.from_pool(ConnectionPool(pool.connection_class, **options))


async def close_client(client: Redis) -> None:
    """Its connections are closed, also those in use; whatever Redis does about it."""
    with suppress(RedisError, OSError):
        await client.aclose()
