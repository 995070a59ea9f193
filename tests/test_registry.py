"""Who is taken for alive: heartbeats in a real table, and a clock that can be set."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, update

import coord.worker.maintenance.registry
from coord.jobs.model import new_id, queues, workers
from coord.worker.maintenance.registry import BLINK_SECONDS as BLINK
from coord.worker.maintenance.registry import DEAD_SECONDS as DEAD
from coord.worker.maintenance.registry import WorkerRegistry, named
from tests.workers import a_state

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
        state = a_state(engine)
        self.me = state.id
        self.registry = WorkerRegistry(state)
        monkeypatch.setattr(coord.worker.maintenance.registry, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def enrol(self, worker: UUID, **jobs: Any) -> None:
        row = {"id": worker, "queue": "default", "host": socket.gethostname(), "pid": 1, "jobs": jobs}
        async with self.engine.begin() as connection:
            await connection.execute(insert(workers), row)

    async def beat(self, worker: UUID, **jobs: Any) -> None:
        beaten = update(workers).where(workers.c.id == worker)
        async with self.engine.begin() as connection:
            await connection.execute(beaten.values(beats=workers.c.beats + 1, jobs=jobs))

    @property
    def living(self) -> set[UUID]:
        return {*self.registry.seen} - {*self.registry.dead}

    async def look(self, after: float = STEP) -> None:
        self.now += after
        await self.registry.round()

    async def look_on(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            await self.look()


@pytest.fixture
async def watch(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch(engine, monkeypatch)
    async with engine.begin() as connection:
        await connection.execute(insert(queues).values(name="default"))
    await watch.enrol(watch.me)
    return watch


async def test_a_heart_that_stands_still_while_it_is_watched_is_dead(watch: Watch) -> None:
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    await watch.look_on(DEAD)
    assert other in watch.living
    await watch.look()
    assert [*watch.registry.dead] == [other]


async def test_a_heart_that_beats_is_alive_however_late_it_beats(watch: Watch) -> None:
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    for _ in range(3):
        await watch.look_on(DEAD)
        await watch.beat(other)
        await watch.look()
    assert other in watch.living


async def test_nobody_is_dead_because_the_watcher_could_not_look(watch: Watch) -> None:
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    await watch.look_on(DEAD - STEP)
    await watch.look(after=BLINK + STEP)
    assert other in watch.living
    await watch.look_on(DEAD)
    assert other in watch.living
    await watch.look()
    assert other in watch.registry.dead


async def test_who_was_seen_to_die_is_dead_at_once(watch: Watch, engine: AsyncEngine) -> None:
    other = new_id()
    await watch.enrol(other)
    await watch.look()
    async with engine.begin() as connection:
        await connection.execute(update(workers).where(workers.c.id == other).values(dead=True))
    await watch.look()
    assert [*watch.registry.dead] == [other]


async def test_nobody_takes_itself_for_dead(watch: Watch) -> None:
    await watch.look_on(3 * DEAD)
    assert watch.living == {watch.me}


async def test_what_the_living_say_they_run_is_held(watch: Watch) -> None:
    job, other = new_id(), new_id()
    await watch.enrol(other, **{str(job): {"attempt": 3}})
    await watch.look()
    assert watch.registry.held_elsewhere == {(job, 3)} == named({str(job): {"attempt": 3}})
    await watch.look_on(DEAD + 1)
    assert watch.registry.held_elsewhere == set()
