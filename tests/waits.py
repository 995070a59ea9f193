"""Waits under test: begun, and known to have had their first look at the row."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import coord.watcher
from coord import wait_for_row_change
from tests.serving import eventually

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


def waiting(session: AsyncSession, *arguments: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(wait_for_row_change(session, *arguments, **{"interval": 0.05, "timeout": 10, **options}))


async def registered(count: int = 1) -> None:
    """Return once so many wait and everybody who waits has had the first look at the row."""

    async def looked() -> bool:
        watchers = coord.watcher._watchers.get(asyncio.get_running_loop(), {}).values()
        groups = [group for watcher in watchers for group in watcher._groups.values()]
        waiters = [waiter for group in groups for waiters in group.waiters.values() for waiter in waiters]
        return len(waiters) >= count and all(waiter.looked for waiter in waiters)

    await eventually(looked)
