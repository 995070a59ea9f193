"""How much of everything: the whole measurement, and the smoke test of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    pairs: int
    """Wakes by hand and by coord's bell, alternating."""
    block: int
    """Pairs of which a ratio of medians is taken."""
    poll_batches: int
    poll_batch: int
    """Waits at once in a batch, each for a row of its own."""
    waiters: int
    peer_waiters: int
    idle_seconds: float
    settle_seconds: float
    """From the last registration until every row has surely been looked at."""
    waves: int
    """Times that all the rows are changed at once, each way."""
    crews: tuple[tuple[int, int], ...]
    """Processes, and connections of each, that write at once; the quickest is the one to compare."""
    plain_crew: tuple[int, int]
    """The same, of writers with asyncpg alone."""
    rounds: int
    plain_rounds: int
    warm_seconds: float
    write_seconds: float


FULL = Scale(
    pairs=600,
    block=40,
    poll_batches=10,
    poll_batch=10,
    waiters=10_000,
    peer_waiters=200,
    idle_seconds=6.0,
    settle_seconds=3.0,
    waves=3,
    crews=((1, 8), (1, 16), (2, 8), (2, 16), (4, 8)),
    plain_crew=(2, 16),
    rounds=16,
    plain_rounds=12,
    warm_seconds=0.2,
    write_seconds=1.2,
)

QUICK = Scale(
    pairs=16,
    block=4,
    poll_batches=1,
    poll_batch=4,
    waiters=100,
    peer_waiters=10,
    idle_seconds=1.0,
    settle_seconds=1.0,
    waves=1,
    crews=((1, 4),),
    plain_crew=(1, 4),
    rounds=1,
    plain_rounds=1,
    warm_seconds=0.1,
    write_seconds=0.2,
)
