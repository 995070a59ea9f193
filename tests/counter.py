"""The shop's counter in this event loop, made with `coord.http`; its jobs are done when a test says so."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from coord import Job, JobState, create_db_dependency, job_transaction
from coord.http import (
    EventStreams,
    HeadRequests,
    Idempotency,
    JobStatus,
    Poll,
    Reply,
    RequestLimits,
    idempotency,
    poll,
    polls,
    problem_handlers,
    problems,
    replies,
    reply,
)
from coord.jobs.ids import new_id
from coord.jobs.model import Worker
from tests.ledger import a_task, delivered
from tests.models import empty
from tests.serving import eventually, served
from worker.models import Base, Order, OrderStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

PROBLEM = "application/problem+json"
URN = "urn:coord:problem:"


class Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    status: OrderStatus


class Asked(BaseModel):
    note: str = ""


@pytest.fixture
async def orders(engine: AsyncEngine, ledger: None) -> AsyncIterator[None]:
    """The shop's tables, empty, beside an empty ledger; emptied again, which also shows that nobody holds a lock."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await empty(engine, Base.metadata)
    yield
    await empty(engine, Base.metadata)


def user(request: Request) -> str:
    return request.headers.get("x-user", "")


@pytest.fixture(scope="module")
async def http(session_maker: SessionMaker) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the counter, with as many connections as it needs."""
    async with served(counter(session_maker), limits=httpx.Limits(max_connections=None)) as client:
        yield client


def counter(maker: SessionMaker, *, streams: EventStreams | None = None, caller: Any = user, **limits: Any) -> FastAPI:
    """Orders are asked for at `/orders/{id}/fulfil`, looked at, polled and followed."""
    open_streams = streams or EventStreams(maker)
    app = FastAPI(exception_handlers=problem_handlers(), responses=problems())
    app.add_middleware(HeadRequests)
    app.add_middleware(RequestLimits, **limits)
    get_db = create_db_dependency(maker)
    once = idempotency(caller=caller)

    async def known(order_id: int, response: Response, session: AsyncSession = Depends(get_db)) -> Order:
        response.headers["X-Counter"] = "3"
        order = await session.get(Order, order_id)
        if order is None:
            raise HTTPException(404, f"there is no order {order_id}")
        return order

    @app.post("/orders/{order_id}/fulfil", response_model=Answer, responses=replies())
    async def fulfil(
        asked: Asked | None = None,
        order: Order = Depends(known),
        once: Idempotency = Depends(once),
        reply: Reply = Depends(reply),
        session: AsyncSession = Depends(get_db),
    ) -> Any:
        job = await once.enqueue(session, a_task, order.id)
        await session.commit()
        found = await reply.row(session, Order, order.id, columns=[Order.status], interval=0.05, job=job)
        return found or await reply.accepted(session, job, location=f"/jobs/{job.id}", order=order.id)

    @app.get("/orders/{order_id}", response_model=Answer, responses=polls())
    async def read(
        poll: Poll = Depends(poll), order: Order = Depends(known), session: AsyncSession = Depends(get_db)
    ) -> Any:
        return await poll.changed(session, order) or poll.not_modified()

    states_of_order = open_streams.of(known, id=version, is_final=is_rejected)

    @app.get("/orders/{order_id}/events", response_class=EventSourceResponse)
    async def events(states: AsyncIterator[Order] = Depends(states_of_order)) -> AsyncIterable[ServerSentEvent]:
        async for order in states:
            yield ServerSentEvent(data=Answer.model_validate(order), id=version(order))

    async def known_job(job_id: UUID, session: AsyncSession = Depends(get_db)) -> Job:
        return await session.get_one(Job, job_id)

    stages_of_job = open_streams.jobs(known_job)

    @app.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
    async def job_events(stages: AsyncIterator[JobStatus] = Depends(stages_of_job)) -> AsyncIterable[ServerSentEvent]:
        async for stage in stages:
            yield ServerSentEvent(data={"state": stage.state}, id=stage.event_id)

    return app


async def pass_on(request: Request, call_next: Any) -> Any:
    """The least that a middleware of `BaseHTTPMiddleware` does."""
    return await call_next(request)


def is_rejected(order: Order) -> bool:
    return order.status is OrderStatus.REJECTED


def version(order: Order) -> str:
    return str(order.version)


async def placed(maker: SessionMaker) -> int:
    """A pending order."""
    async with maker() as session, session.begin():
        order = Order(sku="tea", quantity=1)
        session.add(order)
    return order.id


@pytest.fixture
async def order_id(orders: None, session_maker: SessionMaker) -> int:
    return await placed(session_maker)


async def changed(maker: SessionMaker, order_id: int, status: OrderStatus = OrderStatus.FULFILLED) -> None:
    """The order, changed by somebody whom no bell tells of it."""
    async with maker() as session, session.begin():
        order = await session.get_one(Order, order_id)
        order.status = status
        order.quantity += 1


async def jobs_of(maker: SessionMaker) -> list[Job]:
    """All that are in the ledger."""
    async with maker() as session:
        return [*await session.scalars(select(Job).order_by(Job.id))]


async def the_job(maker: SessionMaker) -> Job:
    """The only one in the ledger, waited for."""
    (job,) = await eventually(lambda: jobs_of(maker))
    assert isinstance(job, Job)
    return job


async def do(maker: SessionMaker, job: Job) -> None:
    """Have the job be done, with its effect on its order."""
    async with job_transaction(delivered(job, maker)) as session:
        order = await session.get_one(Order, job.arguments[0][0])
        order.status = OrderStatus.FULFILLED


async def runs(maker: SessionMaker, job: Job) -> None:
    """Have a worker's heartbeat say that it runs the job."""
    async with maker() as session, session.begin():
        session.add(Worker(id=new_id(), queue="q", host="h", pid=1, jobs={str(job.id): {"attempt": 1}}))


async def end(maker: SessionMaker, job: Job, state: JobState, error: str | None = None) -> None:
    """Have the job end without its effect."""
    async with maker() as session, session.begin():
        await session.execute(update(Job).where(Job.id == job.id).values(state=state, error=error))
