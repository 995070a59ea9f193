"""What a worker was told, checked."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arq.worker import Function
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord.jobs.periodic import Periodic
from coord.queue.keys import QueueKeys
from coord.worker.address import Address

SPARE_CONNECTIONS = 2
"""Of the engine's pool, beside one for each of `max_jobs`: for hooks, and for the ends of jobs that failed."""
Hook = Callable[[dict[Any, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Durations are in seconds."""

    session_maker: async_sessionmaker[AsyncSession]
    address: Address
    keys: QueueKeys
    tasks: Mapping[str, Function]
    max_jobs: int
    max_attempts: int
    """Of a job that says nothing else, as its function does not."""
    job_timeout: float
    idle_limit: float
    grace: float
    keep: float
    unknown_after: float | None
    health_check_key: str
    hooks: Mapping[str, Hook]
    """The application's around each job; none of them fails."""
    periodic: Sequence[Periodic] = ()

    @property
    def signatures(self) -> dict[str, str]:
        """Of the tasks, as workers register them."""
        return {name: str(inspect.signature(task.coroutine)) for name, task in self.tasks.items()}

    def attempts_of(self, task: str) -> int:
        """How many a job of that task has, unless it says something else."""
        known = self.tasks.get(task)
        return (known and known.max_tries) or self.max_attempts
