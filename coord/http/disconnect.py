"""A client that leaves ends what is done for its answer alone, and nothing else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect

from coord.cancellation import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from fastapi import Request

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or `ClientDisconnect` once the client has gone, when the work has ended as well.

    Reads the rest of the request meanwhile, so it comes after the body; where a middleware hides who leaves, the work
    goes on to its own end.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and gone.exception() is None:
            raise ClientDisconnect
        return await task
    finally:
        await uninterrupted(ended(task, gone))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel those that still run, and return when all have ended."""
    running = {task for task in tasks if not task.done()}
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
    for task in tasks:
        if not task.cancelled():
            task.exception()
