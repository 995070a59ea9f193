"""Jobs for whoever has their id: what a 202 says, and the route that its `Location` leads to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID  # noqa: TC003 - FastAPI reads the annotations

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession  # noqa: TC002

from coord.http.problem import problems, public_reason
from coord.jobs.ledger import JobState  # noqa: TC001
from coord.jobs.operations import get_job

if TYPE_CHECKING:
    from collections.abc import Callable


class AcceptedJob(BaseModel):
    id: UUID
    state: JobState


class Accepted(BaseModel):
    """The job goes on: look at it later, or ask again."""

    job: AcceptedJob


class JobStatus(BaseModel):
    """A job as anybody may see it."""

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
    """`GET /jobs/{job_id}`: what has become of a job, for whoever knows its id, which cannot be guessed."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])
    database = Depends(get_db)

    @router.get("/{job_id}", responses=problems(404, 422))
    async def read_job(job_id: UUID, session: AsyncSession = database) -> JobStatus:
        return JobStatus.model_validate(await get_job(session, job_id))

    return router
