"""The table: each part under each fault, with the test that tries it or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTS = {
    "API": "API",
    "worker": "worker",
    "leader": "leader",
    "PostgreSQL": "PG",
    "Redis": "Redis",
    "API–PostgreSQL": "API–PG",
    "API–Redis": "API–R",
    "worker–PostgreSQL": "work–PG",
    "worker–Redis": "work–R",
}
"""What may fail, and its name above a narrow column. The leader is the worker that leads maintenance."""
API, WORKER, LEADER, POSTGRESQL, REDIS, API_POSTGRESQL, API_REDIS, WORKER_POSTGRESQL, WORKER_REDIS = PARTS
PROCESSES, SERVERS = (API, WORKER, LEADER), (POSTGRESQL, REDIS)
LINKS = (API_POSTGRESQL, API_REDIS, WORKER_POSTGRESQL, WORKER_REDIS)

FAULTS = (
    *("kill", "freeze", "restart", "slow (3 s)", "cut", "cut right after COMMIT", "half-open", "reset mid-statement"),
    *("backend terminated", "pool exhausted", "max_connections", "read-only", "failover", "failover, commits lost"),
    *("maxmemory", "too few replicas", "old file restored", "read-only replica", "MISCONF", "ACL", "Sentinel failover"),
    "clock ±1 h",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """What a user observes, and the tests that show it; or the reason why nothing is tried."""

    observed: str = ""
    tests: tuple[str, ...] = ()
    """Beneath `tests/`, with the name that pytest gives each."""
    reason: str = ""

    @property
    def is_tried(self) -> bool:
        return bool(self.tests)


Key = tuple[str, str]
"""Part and fault."""


def cells() -> Iterator[tuple[Key, Cell]]:
    """All of them, fault by fault."""
    from tests.faults.cells import CELLS

    for fault in FAULTS:
        for part in PARTS:
            yield (part, fault), CELLS[part, fault]


def node_ids() -> list[str]:
    """Every test of the table, once, as pytest is told of it."""
    return list(dict.fromkeys(f"tests/{test}" for _, cell in cells() for test in cell.tests))
