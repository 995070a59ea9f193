"""What a check has found, and what it was given to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    what: str
    do: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    engine: AsyncEngine
    """Of the doctor's own, to the database that was named; statements about the ledger find it."""
    schema: str | None
    """Where the ledger is, if not in the default schema."""
    redis: Redis | None
    worker: WorkerConfig | None
    """Of the settings class that was named."""
    namespace: str
