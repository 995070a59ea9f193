"""The round trip: a request that enqueues a job and is answered when the job's effect has landed."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID  # noqa: TC003 - FastAPI reads the annotations

from fastapi import APIRouter, HTTPException, Path, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from api.sessions import Session  # noqa: TC001 - FastAPI reads the annotations
from api.stock import Sku  # noqa: TC001
from coord import Job, JobState, WaitTimeoutError, enqueue, get_job, task_options, wait_for_row_change
from worker.fulfilment import fulfil_order
from worker.models import Order, OrderStatus

WAIT_SECONDS = 25.0  # below what proxies allow a request

OrderId = Annotated[int, Path(ge=-(2**63), lt=2**63)]
Quantity = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]

router = APIRouter(prefix="/orders", tags=["orders"])


class NewOrder(BaseModel):
    sku: Sku
    quantity: Quantity


class OrderAnswer(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    sku: str
    quantity: int
    status: OrderStatus
    invoice_number: int | None


class AcceptedJob(BaseModel):
    id: UUID
    state: JobState


class Accepted(BaseModel):
    job: AcceptedJob
    order: OrderAnswer


@router.post("", status_code=201)
async def place(new: NewOrder, session: Session, response: Response) -> OrderAnswer:
    order = Order(sku=new.sku, quantity=new.quantity, invoice_number=None)
    session.add(order)
    await session.flush()
    response.headers["Location"] = f"/orders/{order.id}"
    return OrderAnswer.model_validate(order)


@router.get("/{order_id}")
async def read(order_id: OrderId, session: Session) -> OrderAnswer:
    return OrderAnswer.model_validate(await _known(session, order_id))


@router.post("/{order_id}/fulfil", response_model=OrderAnswer, responses={202: {"model": Accepted}})
async def fulfil(order_id: OrderId, session: Session) -> OrderAnswer | JSONResponse:
    order = await _known(session, order_id)
    if order.status is not OrderStatus.PENDING:
        return OrderAnswer.model_validate(order)
    job = await enqueue(session, task_options(fulfil_order, unique_key=f"order {order_id}"), order_id)
    await session.commit()
    try:
        order = await wait_for_row_change(
            session=session, model=Order, pk_value=order_id, columns=[Order.status], timeout=WAIT_SECONDS, job=job
        )
    except WaitTimeoutError:
        return await _accepted(session, job, order)
    return OrderAnswer.model_validate(order)


async def _known(session: Session, order_id: int) -> Order:
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"there is no order {order_id}")
    return order


async def _accepted(session: Session, job: Job, order: Order) -> JSONResponse:
    """The job goes on: look at it later, or ask again."""
    report = await get_job(session, job.id)
    answer = Accepted(job=AcceptedJob(id=job.id, state=report.state), order=OrderAnswer.model_validate(order))
    headers = {"Location": f"/jobs/{job.id}", "Retry-After": "1"}
    return JSONResponse(answer.model_dump(mode="json"), 202, headers)
