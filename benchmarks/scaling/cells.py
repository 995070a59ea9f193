"""coord's round trip with so many workers and so many requesters' processes, and all that a request uses."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from benchmarks.figures import percentile
from benchmarks.roundtrip.catalogue import COORD
from benchmarks.roundtrip.crew import TurnError
from benchmarks.roundtrip.turn import TURN_SECONDS, Cost, Team, at_once, spent, staged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.roundtrip.scale import Scale
    from benchmarks.roundtrip.turn import Connect
    from benchmarks.servers import Servers

WAL_SQL = """
SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn AS bytes,
       (SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal') AS flushes,
       (SELECT sum(xact_commit) FROM pg_stat_database) AS transactions
"""


@dataclass(frozen=True, slots=True)
class Use:
    """Of what is not CPU time: counts since the start, or of one request."""

    wal_bytes: float
    wal_flushes: float
    transactions: float
    """With those that only read."""
    redis_commands: float
    redis_bytes: float
    """In and out."""
    bytes: float
    """Over the loopback interface, whoever sent them, with their headers."""

    def since(self, before: Use) -> Use:
        return Use(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def over(self, requests: int) -> Use:
        return Use(*(count / requests for count in astuple(self)))


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of a cell."""

    rate: float
    p50: float
    p99: float
    lost: int
    failed: int
    cost: Cost
    use: Use


@dataclass(frozen=True, slots=True)
class Cell:
    """All the turns of a team in one mode; what it gives is the median of theirs."""

    mode: str
    team: Team
    samples: Sequence[Sample]

    @property
    def rates(self) -> list[float]:
        return sorted(sample.rate for sample in self.samples)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def p50(self) -> float:
        return statistics.median(sample.p50 for sample in self.samples)

    @property
    def p99(self) -> float:
        return statistics.median(sample.p99 for sample in self.samples)

    @property
    def cost(self) -> Cost:
        columns = zip(*(sample.cost.all for sample in self.samples), strict=True)
        return Cost(*map(statistics.median, columns))

    @property
    def use(self) -> Use:
        columns = zip(*(astuple(sample.use) for sample in self.samples), strict=True)
        return Use(*map(statistics.median, columns))


async def sample(servers: Servers, python: Path, mode: str, team: Team, scale: Scale) -> Sample:
    async with asyncio.timeout(TURN_SECONDS), staged(servers, COORD, python, mode, team) as (crew, connect):

        async def observe() -> tuple[Cost, Use]:
            use = await _used(servers, connect)
            return await spent(servers, crew), use

        tally, before, after = await at_once(crew, scale, observe)
        answers = len(tally.microseconds)
        if not answers:
            raise TurnError(f"nothing was answered in time: {tally.failures}")
        return Sample(
            rate=answers / scale.crowd_seconds,
            p50=percentile(tally.microseconds, 0.5) / 1e6,
            p99=percentile(tally.microseconds, 0.99) / 1e6,
            lost=tally.lost,
            failed=tally.failures.total(),
            cost=after[0].since(before[0]).over(answers),
            use=after[1].since(before[1]).over(answers),
        )


async def _used(servers: Servers, connect: Connect) -> Use:
    async with connect() as connection, Redis.from_url(servers.redis_url) as redis:
        wal = await connection.fetchrow(WAL_SQL)
        stats = await redis.info("stats")
    return Use(
        wal_bytes=float(wal["bytes"]),
        wal_flushes=float(wal["flushes"]),
        transactions=float(wal["transactions"]),
        redis_commands=stats["total_commands_processed"],
        redis_bytes=stats["total_net_input_bytes"] + stats["total_net_output_bytes"],
        bytes=_loopback_bytes(),
    )


def _loopback_bytes() -> int:
    """Received; Linux only (proc_net(5), /proc/net/dev)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise RuntimeError("there is no loopback interface")
