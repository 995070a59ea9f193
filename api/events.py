"""What happens to an order, and to a job, as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Annotated
from uuid import UUID  # noqa: TC003 - FastAPI reads the annotations

from fastapi import APIRouter, Depends, HTTPException
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.jobs import JobAnswer
from api.orders import OrderAnswer, known_order
from api.sessions import Session  # noqa: TC001
from coord import Job
from coord.http import EventStreams, JobStage, problems
from worker.database import session_maker
from worker.models import Order

router = APIRouter(tags=["events"])
streams = EventStreams(session_maker)


def version(order: Order) -> str:
    return str(order.version)


OrderStates = Annotated[AsyncIterator[Order], Depends(streams.of(known_order, id=version))]


@router.get("/orders/{order_id}/events", response_class=EventSourceResponse, responses=problems(404, 422))
async def order_events(states: OrderStates) -> AsyncIterable[ServerSentEvent]:
    """The order now, unless its version is `Last-Event-ID`, and its newest state after each change."""
    async for order in states:
        yield ServerSentEvent(event="order", data=OrderAnswer.model_validate(order), id=version(order))


async def known_job(job_id: UUID, session: Session) -> Job:
    """The job of the path."""
    job = await session.get(Job, job_id)
    if job is None:
        raise HTTPException(404, f"there is no job {job_id}")
    return job


JobStages = Annotated[AsyncIterator[JobStage], Depends(streams.jobs(known_job))]


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse, responses=problems(404, 422))
async def job_events(stages: JobStages) -> AsyncIterable[ServerSentEvent]:
    """The job now, and its newest state after each change, until it has ended."""
    async for stage in stages:
        yield ServerSentEvent(event="job", data=JobAnswer.model_validate(stage), id=stage.event_id)
