"""What it costs the writers that waiters are woken: nothing rung, coord's bell, and a trigger with NOTIFY."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from benchmarks.cpu import postgresql_seconds
from benchmarks.figures import estimate
from benchmarks.loop import run
from benchmarks.report import Section, Table, Target
from benchmarks.waiting.process import PROCESSES
from benchmarks.waiting.writer import ROWS, Crew, Turn, Way, main

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from multiprocessing.connection import Connection

    from benchmarks.figures import Estimate
    from benchmarks.report import Row
    from benchmarks.waiting.scale import Scale
    from benchmarks.waiting.stage import Stage

TRIGGER_SQL = """
CREATE FUNCTION notify_order() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_notify('orders', NEW.id::text); RETURN NULL; END $$;
CREATE TRIGGER notify_order AFTER UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION notify_order();
"""
NO_TRIGGER_SQL = "DROP TRIGGER notify_order ON orders; DROP FUNCTION notify_order"

TARGET = 0.9
SILENCE = 5.0
"""Seconds without a ring after which those that are missing were never rung."""

Rates = dict[Way, list[float]]
"""Commits a second of each round."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a crew of this size reached with nothing rung."""

    crew: Crew
    rate: float
    postgresql_cpu: float


@dataclass(frozen=True, slots=True)
class Throughput:
    steps: Sequence[Step]
    crew: Crew
    sessions: Rates
    plain_crew: Crew
    plain: Rates


def measure(stage: Stage, scale: Scale) -> Throughput:
    return run(_measure(stage, scale))


async def _measure(stage: Stage, scale: Scale) -> Throughput:
    crews = [Crew(*size) for size in scale.crews]
    plain_crew = Crew(*scale.plain_crew, plain=True)
    largest = max(crew.processes * crew.connections for crew in (*crews, plain_crew))
    async with stage.orders(largest * ROWS):
        steps = [await _step(stage, crew, scale) for crew in crews]
        crew = max(steps, key=lambda step: step.rate).crew
        sessions = await _rounds(stage, crew, [*Way], scale, scale.rounds)
        plain = await _rounds(stage, plain_crew, [Way.OFF, Way.TRIGGER], scale, scale.plain_rounds)
    return Throughput(steps, crew, sessions, plain_crew, plain)


async def _step(stage: Stage, crew: Crew, scale: Scale) -> Step:
    async with _at_work(stage, crew) as pipes:
        await _turn(stage, pipes, Way.OFF, scale)
        cpu = postgresql_seconds(stage.postgresql_pid)
        rate = await _turn(stage, pipes, Way.OFF, scale)
        cpu = postgresql_seconds(stage.postgresql_pid) - cpu
        return Step(crew, rate, cpu / (scale.warm_seconds + scale.write_seconds))


async def _rounds(stage: Stage, crew: Crew, ways: list[Way], scale: Scale, rounds: int) -> Rates:
    """Every way once a round, each time in another order; the round before the first is not counted."""
    found: Rates = {way: [] for way in ways}
    async with _at_work(stage, crew) as pipes:
        for number in range(-1, rounds):
            turned = number % len(ways)
            for way in (*ways[turned:], *ways[:turned]):
                rate = await _turn(stage, pipes, way, scale)
                if number >= 0:
                    found[way].append(rate)
    return found


@asynccontextmanager
async def _at_work(stage: Stage, crew: Crew) -> AsyncIterator[list[Connection]]:
    pipes, processes = [], []
    try:
        for number in range(crew.processes):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(target=main, args=(theirs, stage, crew, number), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            await asyncio.to_thread(process.join)


async def _turn(stage: Stage, pipes: list[Connection], way: Way, scale: Scale) -> float:
    async with _heard(stage, way) as heard:
        for pipe in pipes:
            pipe.send(way)
        await _answers(pipes)
        begin = time.monotonic() + 0.1
        count = begin + scale.warm_seconds
        for pipe in pipes:
            pipe.send(Turn(begin, count, count + scale.write_seconds))
        commits = sum(await _answers(pipes))
        if way in (Way.BELL, Way.TRIGGER):
            await heard.at_least(commits)
    return commits / scale.write_seconds


async def _answers(pipes: list[Connection]) -> list[int]:
    return list(await asyncio.gather(*(asyncio.to_thread(pipe.recv) for pipe in pipes)))


class _Ear:
    """Counts what is rung or notified, and does nothing with it."""

    def __init__(self) -> None:
        self.count = 0
        self._stirred = asyncio.Event()

    def hear(self, times: int = 1) -> None:
        self.count += times
        self._stirred.set()

    async def at_least(self, times: int) -> None:
        """Or what is said to have been measured was not."""
        while self.count < times:
            self._stirred.clear()
            try:
                await asyncio.wait_for(self._stirred.wait(), SILENCE)
            except TimeoutError:
                raise RuntimeError(f"of {times} changes {self.count} were announced") from None


@asynccontextmanager
async def _heard(stage: Stage, way: Way) -> AsyncIterator[_Ear]:
    """One connection hears all of it."""
    ear = _Ear()
    match way:
        case Way.BARE | Way.OFF:
            yield ear
        case Way.BELL:
            async with _all_bells(stage, ear):
                yield ear
        case Way.TRIGGER:
            async with stage.connection() as listener:
                await listener.execute(TRIGGER_SQL)
                await listener.add_listener("orders", lambda *_: ear.hear())
                yield ear
                await listener.reset()
                await listener.execute(NO_TRIGGER_SQL)


@asynccontextmanager
async def _all_bells(stage: Stage, ear: _Ear) -> AsyncIterator[None]:
    address = urlsplit(stage.redis_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b"PSUBSCRIBE *\r\n")

    async def hear() -> None:
        rest = b""
        while received := await reader.read(1 << 16):
            *messages, rest = (rest + received).split(b"pmessage")
            ear.hear(len(messages))

    hearing = asyncio.create_task(hear())
    try:
        yield
    finally:
        writer.close()
        await hearing


def report(found: Throughput, scale: Scale) -> Section:
    steps: list[Row] = [(_size(step.crew), f"{step.rate:,.0f}", f"{step.postgresql_cpu:.1f}") for step in found.steps]
    tables = [
        Table(("processes × connections, nothing rung", "commits/s", "cores that PostgreSQL used"), steps),
        _table(f"SQLAlchemy sessions, {_size(found.crew)}", found.sessions),
        _table(f"asyncpg, {_size(found.plain_crew)}", found.plain),
    ]
    remarks = [
        "Each commit changes one row. The size that commits most is the one compared.",
        "With the bell and with NOTIFY, one connection hears all of it.",
        f"The ratio is the median, with its 95 % interval, of {scale.rounds} ratios to nothing rung in the same round.",
    ]
    bell, trigger = (ratio(found.sessions, way) for way in (Way.BELL, Way.TRIGGER))
    plain = ratio(found.plain, Way.TRIGGER)
    measured = f"{bell}; NOTIFY {trigger}, with asyncpg {plain}"
    target = Target("writers' throughput, bell on / off", f"≥ {TARGET}", measured, bell.value >= TARGET)
    return Section("Writers' throughput", tables, [target], remarks)


def _size(crew: Crew) -> str:
    return f"{crew.processes} × {crew.connections}"


def _table(what: str, rates: Rates) -> Table:
    rows: list[Row] = []
    for way, values in rates.items():
        to_off = "1" if way is Way.OFF else str(ratio(rates, way))
        spread = f"{min(values):,.0f}–{max(values):,.0f}"
        rows.append((way, f"{statistics.median(values):,.0f}", spread, to_off))
    return Table((what, "commits/s", "lowest–highest", "ratio"), rows)


def ratio(rates: Rates, way: Way) -> Estimate:
    return estimate([mine / off for mine, off in zip(rates[way], rates[Way.OFF], strict=True)])
