"""Which worker looks after a queue: one that reaches both servers, and within seconds another if it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from arq.worker import func
from sqlalchemy import select

from coord.jobs.model import queues
from tests.serving import eventually
from tests.shop import Network
from tests.workers import working

if TYPE_CHECKING:
    from uuid import UUID

    from tests.workers import Office

WITHIN = 10.0
"""Seconds: a lease and somebody's next look, and then the five in which a job is found that nobody has handed over."""


async def leader(office: Office) -> UUID | None:
    async with office.session_maker() as session:
        found: UUID | None = await session.scalar(select(queues.c.leader))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("server", ["Redis", "PostgreSQL"])
async def test_who_is_cut_off_from_one_server_alone_leads_nothing(office: Office, script: Office, server: str) -> None:
    """The eldest of three, who was the leader; it leads again, or another, when it can."""
    ran: list[str] = []

    def tasks(worker: str) -> list[Any]:
        async def task(ctx: dict[str, Any]) -> None:
            ran.append(worker)

        return [func(task, name="task")]

    url = office.redis_url if server == "Redis" else office.database_url
    async with Network(url).opened() as network:
        network.up = True
        options: dict[str, Any] = {"redis" if server == "Redis" else "database_url": network.url}
        async with working(office, tasks("eldest"), **options) as eldest:
            first = await eventually(lambda: leader(office))
            async with working(office, tasks("second")), working(office, tasks("third")):
                network.cut()

                async def another_leads() -> bool:
                    return await leader(office) not in (None, first)

                await eventually(another_leads, within=WITHIN)
                row = await office.final(await script.enqueue("task"), within=WITHIN)
                assert (row.state, row.attempt) == ("done", 1)
                assert ran in (["second"], ["third"])
                assert await leader(office) != first
                assert eldest.lives
            network.up = True
            await office.final(await script.enqueue("task"), within=2 * WITHIN)
            assert ran[1:] == ["eldest"]
            assert eldest.lives
