"""A redis-py client of our own that connects as a given one does."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from collections.abc import Sequence

    Command = tuple[str | bytes | int | float, ...]
    """As redis-py's `execute_command` takes it."""
    Commands = Sequence[Command]

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
