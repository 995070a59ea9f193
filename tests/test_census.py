"""Who is taken for alive: heartbeats in a real table, and a clock that can be set."""

# ruff: noqa: F401 - a fixture is imported
from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, update

import coord.worker.census
from coord.jobs.model import new_id, workers
from coord.worker.census import BLINK, DEAD, Census
from tests.ledger import ledger

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.usefixtures("ledger")
STEP = 0.5


class Watch:
    """One worker that watches others."""

    def __init__(self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.now = 1_000.0
        self.me = new_id()
        self.census = Census(SimpleNamespace(id=self.me, queue="default"))  # type: ignore[arg-type]
        monkeypatch.setattr(coord.worker.census, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def enrol(self, worker: UUID, **jobs: Any) -> None:
        row = {"id": worker, "queue": "default", "host": socket.gethostname(), "pid": 1, "jobs": jobs}
        async with self.engine.begin() as connection:
            await connection.execute(insert(workers), row)

    async def beat(self, worker: UUID, **jobs: Any) -> None:
        beaten = update(workers).where(workers.c.id == worker)
        async with self.engine.begin() as connection:
            await connection.execute(beaten.values(beats=workers.c.beats + 1, jobs=jobs))

    def leads(self) -> bool:
        return self.census.leads

    async def look(self, after: float = STEP) -> None:
        self.now += after
        async with self.engine.connect() as connection:
            await self.census.take(connection)

    async def look_on(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            await self.look()


@pytest.fixture
async def watch(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch(engine, monkeypatch)
    await watch.enrol(watch.me)
    return watch


async def test_a_heart_that_stands_still_while_it_is_watched_is_dead(watch: Watch) -> None:
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    await watch.look_on(DEAD)
    assert other in watch.census.living
    await watch.look()
    assert [*watch.census.dead] == [other]


async def test_a_heart_that_beats_is_alive_however_late_it_beats(watch: Watch) -> None:
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    for _ in range(3):
        await watch.look_on(DEAD)
        await watch.beat(other)
        await watch.look()
    assert other in watch.census.living


async def test_nobody_is_dead_because_the_watcher_could_not_look(watch: Watch) -> None:
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    await watch.look_on(DEAD - STEP)
    await watch.look(after=BLINK + STEP)
    assert other in watch.census.living
    await watch.look_on(DEAD)
    assert other in watch.census.living
    await watch.look()
    assert other in watch.census.dead


async def test_the_eldest_of_the_living_leads(watch: Watch) -> None:
    younger = new_id()
    await watch.enrol(younger)
    await watch.look()
    assert watch.leads() is True
    watch.census._identity = SimpleNamespace(id=younger, queue="default")  # type: ignore[assignment]
    await watch.look()
    assert watch.leads() is False
    for _ in range(round(DEAD / STEP) + 1):
        await watch.beat(younger)
        await watch.look()
    assert watch.leads() is True


async def test_who_is_not_on_the_list_does_not_lead(watch: Watch) -> None:
    watch.census._identity = SimpleNamespace(id=new_id(), queue="default")  # type: ignore[assignment]
    await watch.look()
    assert not watch.census.leads


async def test_a_worker_is_heard_when_a_heartbeat_came_that_had_not_been_there(watch: Watch) -> None:
    """What it ran before the watcher began to look, or during a pause, is no news."""
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    await watch.beat(watch.me)
    moment = watch.now - 10
    assert not watch.census.all_heard_since(moment)
    await watch.look(after=BLINK + STEP)
    assert not watch.census.all_heard_since(moment)
    moment = watch.now
    await watch.beat(other, job={"attempt": 3})
    await watch.beat(watch.me)
    await watch.look()
    assert not watch.census.all_heard_since(moment), "it may have been written just before that moment"
    await watch.beat(other, job={"attempt": 3})
    await watch.beat(watch.me)
    await watch.look()
    assert watch.census.all_heard_since(moment)
    assert watch.census.held == {("job", 3)}
