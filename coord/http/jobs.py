"""Jobs for clients that have their id: what a 202 has, where its `Location` leads, and whether a job runs just now."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID  # noqa: TC003 - FastAPI reads the annotations

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker  # noqa: TC002

from coord.http.problem import problems, public_reason
from coord.jobs import queries
from coord.jobs.model import Job, JobState

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("coord.http")

HEARTBEAT_INTERVAL_SECONDS = 2.0
"""Between two heartbeats of a worker, and between two reads of them for a stream."""
MAX_AGE_SECONDS = 1.0
"""For which one read of them will do for all streams."""


class AcceptedJob(BaseModel):
    id: UUID
    state: JobState


class Accepted(BaseModel):
    """The job goes on: look at it later, or ask again."""

    job: AcceptedJob


class JobStatus(BaseModel):
    """A job as any client may see it."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    task: str
    state: JobState
    attempt: int
    error: Annotated[str | None, AfterValidator(public_reason)]
    """One line."""

    @property
    def event_id(self) -> str:
        """For an event stream: another one after each change of attempt or state."""
        return f"{self.attempt}-{self.state}"


def job_status_routes(get_db: Callable[..., Any]) -> APIRouter:
    """`GET /jobs/{job_id}`: the state of a job, for clients that know its id, which cannot be guessed."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])
    database = Depends(get_db)

    @router.get("/{job_id}", responses=problems(404, 422))
    async def read_job(job_id: UUID, session: AsyncSession = database) -> JobStatus:
        return JobStatus.model_validate(await queries.get_job(session, job_id))

    return router


class RunningJobs:
    """The workers' last heartbeats."""

    def __init__(self, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self._session_maker = session_maker
        self._running: set[tuple[UUID, int]] = set()
        self._expires = 0.0
        self._lock = asyncio.Lock()

    async def status_of(self, job: Job) -> JobStatus:
        """As it is at the call: the instance may be brought up to date meanwhile.

        Reads the heartbeats only for an unfinished job, in a transaction of its own.
        """
        status = JobStatus.model_validate(job)
        if not status.state.is_final:
            async with self._lock:
                await self._read()
            if (status.id, status.attempt) in self._running:
                status.state = JobState.RUNNING
        return status

    async def _read(self) -> None:
        if (now := asyncio.get_running_loop().time()) < self._expires:
            return
        self._expires = now + MAX_AGE_SECONDS
        try:
            async with self._session_maker() as session:
                self._running = {(beat.id, beat.attempt) for beat in await queries.heartbeats(session)}
        except Exception as error:  # noqa: BLE001 - what was known stays known until it can be read again
            logger.debug("The workers' heartbeats cannot be read: %s", error)
