"""Which worker looks after a queue: one that reaches both servers, and within seconds another if it does not."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import arq.worker
import pytest
from sqlalchemy import func, insert, select

from coord.jobs.model import queues
from coord.worker.maintenance.leader import Leader
from tests.serving import eventually
from tests.shop import Network
from tests.workers import a_state, working

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

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

        return [arq.worker.func(task, name="task")]

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


@pytest.mark.parametrize(("ahead", "leads"), [(2.0, False), (3600.0, True), (-1.0, True)])
async def test_a_lease_holds_for_seconds_whatever_becomes_of_the_clock_by_which_it_was_given(
    office: Office, engine: AsyncEngine, ahead: float, leads: bool
) -> None:
    """A replica that was promoted may have another one, and the leader may be gone together with the old primary."""
    async with office.session_maker.begin() as session:
        until = func.now() + timedelta(seconds=ahead)
        await session.execute(insert(queues).values(name="default", leader=uuid4(), leader_until=until))
    state = a_state(engine, office.redis)
    await Leader(state).round()
    assert state.is_leader == leads
