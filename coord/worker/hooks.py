"""The application's hooks around jobs, arq's own included: one that fails must not end the worker."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coord.worker.config import Hook

logger = logging.getLogger("arq.coord")


async def call(hook: Hook | None, ctx: dict[Any, Any]) -> None:
    """A failure is logged, and the job goes on."""
    if hook is None:
        return
    try:
        await hook(ctx)
    except Exception:
        logger.exception("%s has failed", getattr(hook, "__qualname__", hook))


def guarded(hook: Hook | None) -> Hook | None:
    """For arq, which would end with it."""
    if hook is None:
        return None

    async def run(ctx: dict[Any, Any]) -> None:
        await call(hook, ctx)

    return run
