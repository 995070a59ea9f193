"""Waits under test: begun, and known to have had their first look at the row."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import coord.waiting.watcher
from coord import wait_for_row_change
from tests.serving import eventually

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.waiting.waiter import Waiter


def waiting(session: AsyncSession, *arguments: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(wait_for_row_change(session, *arguments, **{"interval": 0.05, "timeout": 10, **options}))


def waiters() -> list[Waiter[Any]]:
    """All that wait in this event loop."""
    watchers = coord.waiting.watcher._watchers.get(asyncio.get_running_loop(), {}).values()
    groups = [group for watcher in watchers for group in watcher._groups.values()]
    return [waiter for group in groups for found in group.waiters.values() for waiter in found]


async def registered(count: int = 1) -> None:
    """Return once so many wait and everybody who waits has had the first look at the row."""

    async def looked() -> bool:
        return len(found := waiters()) >= count and all(waiter.looked for waiter in found)

    await eventually(looked)
