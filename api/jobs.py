"""What has become of a job."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID  # noqa: TC003 - FastAPI reads the annotations

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict

from api.sessions import Session  # noqa: TC001
from coord import JobState, get_job
from coord.http import problems, public_reason

router = APIRouter(prefix="/jobs", tags=["jobs"])


class AcceptedJob(BaseModel):
    id: UUID
    state: JobState


class JobAnswer(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: UUID
    task: str
    state: JobState
    attempt: int
    error: Annotated[str | None, AfterValidator(public_reason)]


@router.get("/{job_id}", responses=problems(404, 422))
async def read_job(job_id: UUID, session: Session) -> JobAnswer:
    return JobAnswer.model_validate(await get_job(session, job_id))
