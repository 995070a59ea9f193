"""How much of everything: the whole measurement, and the smoke test of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    pairs: int
    """Of floor and coord, for each lock mode."""
    rounds: int
    """Of everybody else, for each lock mode."""
    requests: int
    """One at a time, in a turn."""
    request_seconds: float
    """After which there are no more of them, for who takes half a second for one."""
    think_seconds: float
    """At most, before each of them."""
    requesters: int
    """At once, in one process."""
    warm_seconds: float
    crowd_seconds: float


FULL = Scale(
    pairs=10,
    rounds=2,
    requests=300,
    request_seconds=8.0,
    think_seconds=0.02,
    requesters=100,
    warm_seconds=1.5,
    crowd_seconds=7.0,
)

QUICK = Scale(
    pairs=1,
    rounds=1,
    requests=10,
    request_seconds=2.0,
    think_seconds=0.02,
    requesters=20,
    warm_seconds=0.2,
    crowd_seconds=0.7,
)
