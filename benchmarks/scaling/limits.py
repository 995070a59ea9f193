"""Where the measured costs lead: how many requests a second until this or that is full, with the arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.report import Section, Table
from benchmarks.roundtrip.orders import CONCURRENCY

if TYPE_CHECKING:
    from benchmarks.report import Row
    from benchmarks.scaling.cells import Cell

SHARE = 0.7
"""Of anything that may be used, or requests queue for it."""
CORES = 16
"""Of the machine that PostgreSQL has."""
DISK_BYTES = 200_000_000
"""A second, that its disk writes."""
DISK_FLUSHES = 2_000
"""A second, one after another."""
NETWORK_BYTES = 1_250_000_000
"""A second, to and from PostgreSQL and Redis together: 10 Gbit/s."""
MAINTENANCE = 6
"""Connections that a worker has beside its pool, at most."""


@dataclass(frozen=True, slots=True)
class Limit:
    what: str
    has: str
    """How much of it there is."""
    each: float
    """Used by a request, in the unit of `full`."""
    written: str
    """The same, with its unit."""
    full: float
    """A second, of which `SHARE` may be used."""

    @property
    def rate(self) -> float:
        return SHARE * self.full / self.each if self.each else math.inf

    def row(self) -> Row:
        each = f"{self.each:,.0f}" if self.each >= 100 else f"{self.each:.2f}"
        arithmetic = f"{SHARE} × {self.full:,.0f} / {each}"
        return self.what, self.has, self.written, arithmetic, f"{self.rate:,.0f}"


API, WORKER, POSTGRESQL = "one API process", "one worker process", "PostgreSQL"


def limits(cell: Cell) -> dict[str, Limit]:
    cost, use = cell.cost, cell.use
    microseconds = {
        API: ("one core", cost.requester, 1),
        WORKER: ("one core", cost.worker, 1),
        POSTGRESQL: (f"{CORES} cores", cost.postgresql, CORES),
        "Redis": ("one core, for its one thread", cost.redis, 1),
    }
    found = [
        Limit(what, has, each * 1e6, f"{each * 1e6:,.0f} µs", cores * 1e6)
        for what, (has, each, cores) in microseconds.items()
    ]
    found += [
        Limit(
            "bytes of WAL", f"{DISK_BYTES / 1e6:,.0f} MB/s", use.wal_bytes, f"{use.wal_bytes / 1e3:.1f} kB", DISK_BYTES
        ),
        Limit("flushes of WAL", f"{DISK_FLUSHES:,}/s", use.wal_flushes, f"{use.wal_flushes:.2f}", DISK_FLUSHES),
        Limit("network", "10 Gbit/s", use.bytes, f"{use.bytes / 1e3:.1f} kB", NETWORK_BYTES),
    ]
    return {limit.what: limit for limit in found}


def report(side_by_side: Cell, exclusive: Cell) -> Section:
    found = limits(side_by_side)
    head = ("what is full", "of which there is", "a request uses", "arithmetic", "requests/s")
    team = side_by_side.team
    costs = (
        f"Costs are those that were found where most was answered under {side_by_side.mode}: API processes "
        f"{team.requesters}, worker processes {team.workers}. Of anything, {SHARE} may be used, or requests queue. "
        f"A request made {side_by_side.use.transactions:.1f} transactions, those that only read among them, and "
        f"{side_by_side.use.redis_commands:.1f} Redis commands of {side_by_side.use.redis_bytes / 1e3:.1f} kB."
    )
    lock = (
        f"{exclusive.mode} has a limit of its own, which no machine moves: one job at a time. Best here were "
        f"{exclusive.rate:.0f} requests a second, so a job kept the table, and the inserts waiting, for at most "
        f"1,000 / {exclusive.rate:.0f} = {1_000 / exclusive.rate:.1f} ms."
    )
    flushes = "One flush of WAL serves all commits that wait for it, so the more come at once, the fewer each uses."
    tables = [Table(head, [limit.row() for limit in found.values()]), _fleet(found)]
    return Section("Limits", tables, remarks=[costs, flushes, lock])


def _fleet(found: dict[str, Limit]) -> Table:
    """How many processes bring PostgreSQL to its limit, and what they need of it."""
    full = found[POSTGRESQL].rate
    apis, workers = (math.ceil(full / found[what].rate) for what in (API, WORKER))
    connections = (apis + workers) * CONCURRENCY + workers * MAINTENANCE
    rows: list[Row] = [
        ("API processes", f"{full:,.0f} / {found[API].rate:,.0f}", f"{apis:,}"),
        ("worker processes", f"{full:,.0f} / {found[WORKER].rate:,.0f}", f"{workers:,}"),
        (
            "connections, with pools of 20",
            f"({apis:,} + {workers:,}) × {CONCURRENCY} + {workers:,} × {MAINTENANCE}",
            f"{connections:,}",
        ),
    ]
    return Table((f"at PostgreSQL's limit, {full:,.0f} requests/s", "arithmetic", "there are"), rows)
