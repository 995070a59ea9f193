"""A limit that holds although what it limits hangs in its own clean-up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

T = TypeVar("T")


async def in_time(work: Awaitable[T], seconds: float) -> T:
    """The result, or `TimeoutError` when the time is up; late work is told to stop, and not waited for.

    `asyncio.timeout` does wait for it: for an UNWATCH or a ROLLBACK to a server that does not answer.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
