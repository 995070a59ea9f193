"""arq's hooks around jobs, which the application gives: one that fails must not end the worker."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Hook = Callable[[dict[Any, Any]], Awaitable[None]]

logger = logging.getLogger("arq.coord")

LAST = 5.0
"""Seconds that a hook may still take when the worker stops."""


async def call(hook: Hook | None, ctx: dict[Any, Any]) -> None:
    """A failure is logged, and the job goes on."""
    if hook is None:
        return
    try:
        await hook(ctx)
    except Exception:
        logger.exception("%s has failed", getattr(hook, "__qualname__", hook))


def uncancelled(hook: Hook | None) -> Hook | None:
    """For arq to call when a job is over: who cancels it then would have arq forget to say so."""
    if hook is None:
        return None

    async def run(ctx: dict[Any, Any]) -> None:
        task = asyncio.create_task(call(hook, ctx))
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=LAST)
            task.cancel()

    return run
