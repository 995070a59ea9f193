"""Which failures of a task pass by themselves, and when to try again."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

from arq import Retry
from sqlalchemy.exc import DBAPIError

from coord import CoordError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MAX_TRIES = 20


def retried(task: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Run the whole task again, with backoff and jitter, after a lock timeout, a deadlock or a lost connection."""

    @functools.wraps(task)
    async def attempt(ctx: dict[str, Any], *args: Any) -> None:
        try:
            await task(ctx, *args)
        except (CoordError, DBAPIError, OSError) as error:
            if not _passes(error):
                raise
            pause = min(0.1 * 2 ** ctx["job_try"], 10.0)
            raise Retry(defer=pause * random.uniform(0.5, 1.0)) from error

    return attempt


def _passes(error: CoordError | DBAPIError | OSError) -> bool:
    match error:
        case CoordError():
            return error.retryable
        case DBAPIError():
            return error.connection_invalidated
        case _:
            return True
