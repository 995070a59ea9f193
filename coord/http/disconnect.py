"""What ends a wait before its time: the client disconnects, or the server stops."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect

from coord.cancellation import uninterrupted
from coord.http.stopping import stop_observed

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from fastapi import Request

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, None once the server stops, `ClientDisconnect` once the client has left; it has ended then.

    Reads the rest of the request meanwhile, so it comes after the body; where a middleware hides the disconnect,
    the work goes on to its own end.
    """
    with stop_observed() as stopped:
        task: asyncio.Future[T] = asyncio.create_task(work)
        left: asyncio.Future[None] = asyncio.create_task(_disconnected(request))
        try:
            await _first(task, left, stopped)
            if left.done() and left.exception() is not None:  # which is no departure
                await _first(task, stopped)
            elif left.done() and not task.done():
                raise ClientDisconnect
            return task.result() if task.done() else None
        finally:
            await uninterrupted(ended(task, left))


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def _disconnected(request: Request) -> None:
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
