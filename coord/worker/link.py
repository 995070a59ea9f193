"""A Redis client for what must be quick: one command at a time, no retry, and an end to every wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoScriptError, ResponseError

from coord.notify.client import close_client, own_client

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

    from coord.notify.outage import Outage

ANSWER_TIMEOUT_SECONDS = 2.0
"""After which Redis counts as away."""


class Link:
    """Connected by the first command, and anew by the next one after an error: it may be a replica's by now."""

    def __init__(self, pool: ConnectionPool, outage: Outage) -> None:
        self._client = own_client(pool)
        self._outage = outage
        self._turn = asyncio.Lock()

    async def execute_command(self, *command: Any) -> Any:
        """The answer; `RedisError` or `OSError`, `TimeoutError` among them."""
        async with self._turn:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                    return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]
            except NoScriptError:
                raise
            except ResponseError:
                await self.close()
                raise
            except TimeoutError:
                raise TimeoutError(f"Redis has not answered for {ANSWER_TIMEOUT_SECONDS:g} s") from None

    def report(self, error: Exception | None) -> None:
        """Say that Redis is away, or back, once."""
        self._outage.report(error, "link")

    async def close(self) -> None:
        await close_client(self._client)
