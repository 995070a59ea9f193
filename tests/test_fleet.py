"""The queues and the workers, as console and command line show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import coord.fleet
from coord import enqueue, task_options
from coord.fleet import Number, living_workers, look_at_fleet, queue_depths
from tests.ledger import a_task

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker


@pytest.mark.usefixtures("ledger")
async def test_a_depth_is_exact_or_says_that_there_are_more(
    session_maker: async_sessionmaker[AsyncSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.fleet, "MAX_EXACT_JOBS", 2)
    async with session_maker() as session:
        for _ in range(5):
            await enqueue(session, task_options(a_task, queue="letters"))
        (counted,) = await queue_depths(session, await living_workers(session))
        (shown,) = (await look_at_fleet(session)).queues
    assert (counted.name, counted.due, counted.later) == ("letters", Number(5), Number(0))
    assert (shown.due.value, shown.due.exact) == (3, False)
