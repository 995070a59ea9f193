"""Jobs over HTTP: what a 202 has, where its `Location` leads, and, for who has the token, list, cancel, run again."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException, Query, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from coord.http.problem import problems, public_reason
from coord.jobs import queries
from coord.jobs.model import JobState
from coord.jobs.queries import JobReport

MIN_TOKEN_LENGTH = 16
_bearer = HTTPBearer(auto_error=False)


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


class StateAnswer(BaseModel):
    """The state that an operation has found or made."""

    state: JobState


def job_status_routes(get_db: Callable[..., Any]) -> APIRouter:
    """`GET /jobs/{job_id}`: the state of a job, for clients that know its id.

    Ids have 62 random bits; only that of a `periodic` schedule's job follows from the schedule and its slot.
    """
    router = APIRouter(prefix="/jobs", tags=["jobs"])
    database = Depends(get_db)

    @router.get("/{job_id}", responses=problems(404, 422))
    async def read_job(job_id: UUID, session: AsyncSession = database) -> JobStatus:
        return JobStatus.model_validate(await queries.get_job(session, job_id))

    return router


def bearer_token(token: str | None) -> Callable[..., Awaitable[None]]:
    """A dependency that lets requests with `token` through, compared in constant time, or with None all.

    Raises `ValueError` for a token of less than 16 characters.
    """
    if token is not None and len(token) < MIN_TOKEN_LENGTH:
        raise ValueError(f"a token has at least {MIN_TOKEN_LENGTH} characters")

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> None:
        offered = b"" if given is None else given.credentials.encode("latin-1")  # the bytes that were sent
        if token is not None and not secrets.compare_digest(offered, token.encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    return check


def job_routes(get_db: Callable[..., Any], *, token: str | None) -> APIRouter:
    """`GET /jobs`, `GET /jobs/{id}/details`, `POST /jobs/{id}/cancel` and `/retry`, for clients with the bearer token.

    With `token=None` they are open to all that can reach them: for development.
    """
    router = APIRouter(prefix="/jobs", tags=["job administration"], dependencies=[Depends(bearer_token(token))])
    database = Depends(get_db)

    @router.get("", responses=problems(401, 422))
    async def list_jobs(
        session: AsyncSession = database,
        state: JobState | None = None,
        task: Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")] = None,
        before: UUID | None = None,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    ) -> list[JobReport]:
        """Jobs, the newest first; `before` is the last of the page before."""
        found = await queries.list_jobs(session, state=state, task=task, before=before, limit=limit)
        return [*map(_sendable, found)]

    @router.get("/{job_id}/details", responses=problems(401, 404, 422))
    async def job_details(job_id: UUID, session: AsyncSession = database) -> JobReport:
        return _sendable(await queries.get_job(session, job_id))

    @router.post("/{job_id}/cancel", responses=problems(401, 404, 422))
    async def cancel_job(job_id: UUID, session: AsyncSession = database) -> StateAnswer:
        """`cancelled`, or `running` until its worker has cancelled it, or the state in which it had already ended."""
        return StateAnswer(state=await queries.cancel_job(session, job_id))

    @router.post("/{job_id}/retry", responses=problems(401, 404, 409, 422))
    async def retry_job(job_id: UUID, session: AsyncSession = database) -> StateAnswer:
        """Have a failed or cancelled job run again."""
        try:
            return StateAnswer(state=(await queries.retry_job(session, job_id)).state)
        except ValueError as error:
            raise HTTPException(409, "only a failed or cancelled job can be run again") from error

    return router


def _sendable(report: JobReport) -> JobReport:
    """Without half a surrogate pair, which JSON may have in its texts, and which cannot be sent."""
    said = json.dumps([report.arguments, report.result, report.progress], ensure_ascii=False)
    if said.isascii():
        return report
    arguments, result, progress = json.loads(said.encode(errors="replace"))
    return replace(report, arguments=arguments, result=result, progress=progress)
