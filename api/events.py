"""What happens to an order, and to a job, as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.orders import OrderAnswer, known_order
from api.sessions import Session
from coord import Job
from coord.http import EventStreams, JobStatus, finishes, problems
from worker.database import session_maker
from worker.models import Order, OrderStatus

router = APIRouter(tags=["events"])
streams = EventStreams(session_maker)
declared = finishes() | problems(404, 422)


def version(order: Order) -> str:
    return str(order.version)


def is_settled(order: Order) -> bool:
    return order.status is not OrderStatus.PENDING


OrderStates = Annotated[AsyncIterator[Order], Depends(streams.of(known_order, id=version, is_final=is_settled))]


@router.get("/orders/{order_id}/events", response_class=EventSourceResponse, responses=declared)
async def order_events(states: OrderStates) -> AsyncIterable[ServerSentEvent]:
    """The order now, unless its version is `Last-Event-ID`, and its newest after each change, until it is settled."""
    async for order in states:
        yield ServerSentEvent(event="order", data=OrderAnswer.model_validate(order), id=version(order))


async def known_job(job_id: UUID, session: Session) -> Job:
    """The job of the path."""
    job = await session.get(Job, job_id)
    if job is None:
        raise HTTPException(404, f"there is no job {job_id}")
    return job


JobStatuses = Annotated[AsyncIterator[JobStatus], Depends(streams.jobs(known_job))]


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse, responses=declared)
async def job_events(statuses: JobStatuses) -> AsyncIterable[ServerSentEvent]:
    """The job now, and its newest state after each change, until it has ended."""
    async for status in statuses:
        yield ServerSentEvent(event="job", data=status, id=status.event_id)
