"""What is done to a link: each lasts as long as its block."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.proxy import Proxy, Wire
    from tests.shop import Network

LATE_SECONDS = 3.0


@asynccontextmanager
async def cut(link: Network) -> AsyncIterator[None]:
    """Who is there is thrown out, and who comes is refused."""
    link.cut()
    try:
        yield
    finally:
        link.up = True


@asynccontextmanager
async def half_open(link: Network) -> AsyncIterator[None]:
    """Packets vanish without FIN or RST. Connections from before are dead for good."""
    link.lose_everything()
    try:
        yield
    finally:
        link.lead_again()


@asynccontextmanager
async def late(link: Network) -> AsyncIterator[None]:
    """Each answer comes three seconds late."""
    link.answers_later = LATE_SECONDS
    try:
        yield
    finally:
        link.answers_later = 0.0


@asynccontextmanager
async def reset(link: Network) -> AsyncIterator[None]:
    """Once, in the middle of whatever is under way."""
    link.reset()
    yield


def at_commit(
    link: Proxy, then: Callable[[Wire], None], *, arrives: bool, port: int | None = None, after: bytes = b""
) -> asyncio.Event:
    """Have that called as the next COMMIT passes, of this connection if one is given; the event says that it has.

    `arrives`: it is called right after PostgreSQL was sent the COMMIT; else right before, and it never is. `after`:
    what that connection must have been sent before.
    """
    passed = asyncio.Event()
    sent: set[Wire] = set()

    def on_request(wire: Wire, data: bytes) -> bool:
        if after in data:
            sent.add(wire)
        if b"COMMIT" not in data or port not in (None, wire.port) or wire not in sent:
            return False
        link.on_request = None
        if arrives:
            wire.server.write(data)
        then(wire)
        passed.set()
        return True

    link.on_request = on_request
    return passed
