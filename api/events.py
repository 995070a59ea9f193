"""What happens to an order, and to a job, as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterable  # noqa: TC003 - FastAPI reads the annotations
from typing import Annotated
from uuid import UUID  # noqa: TC003

from fastapi import APIRouter, Depends, HTTPException
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.jobs import JobAnswer
from api.orders import KnownOrder, OrderAnswer
from api.sessions import Session  # noqa: TC001
from coord import Job
from coord.http import EventStreams, Stream, problems
from worker.database import session_maker
from worker.models import Order  # noqa: TC001

router = APIRouter(tags=["events"])
streams = EventStreams(session_maker)
Events = Annotated[Stream, Depends(streams.stream)]


@router.get("/orders/{order_id}/events", response_class=EventSourceResponse, responses=problems(404, 422, 503))
async def order_events(order: KnownOrder, stream: Events) -> AsyncIterable[ServerSentEvent]:
    """The order now, unless its version is `Last-Event-ID`, and its newest state after each change."""
    async for state in stream.rows(order, id=_version):
        yield ServerSentEvent(event="order", data=OrderAnswer.model_validate(state), id=_version(state))


async def known_job(job_id: UUID, session: Session) -> Job:
    job = await session.get(Job, job_id)
    if job is None:
        raise HTTPException(404, f"there is no job {job_id}")
    return job


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse, responses=problems(404, 422, 503))
async def job_events(job: Annotated[Job, Depends(known_job)], stream: Events) -> AsyncIterable[ServerSentEvent]:
    """The job now, and its newest state after each change, until it has ended."""
    columns = [Job.state, Job.attempt, Job.error]
    async for state in stream.rows(job, id=_attempt, columns=columns, final=lambda job: job.state.is_final):
        yield ServerSentEvent(event="job", data=JobAnswer.model_validate(state), id=_attempt(state))


def _version(order: Order) -> str:
    return str(order.version)


def _attempt(job: Job) -> str:
    return f"{job.attempt}-{job.state}"
