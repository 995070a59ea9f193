"""The round trip: a request that enqueues a job and is answered when the job's effect has landed."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Request, Response
from pydantic import BaseModel, ConfigDict

from api.links import ACCEPTED, PLACED
from api.sessions import Session
from api.stock import Quantity, Sku
from coord import task_options
from coord.http import Accepted, Idempotency, Poll, Reply, idempotency, poll, polls, problems, replies, reply
from worker import fulfilment
from worker.models import Order, OrderStatus

router = APIRouter(prefix="/orders", tags=["orders"])

OrderId = Annotated[int, Path(ge=-(2**63), lt=2**63)]


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


class AcceptedOrder(Accepted):
    """The job goes on: look at it later, or ask again."""

    order: OrderAnswer


def everybody(_request: Request) -> str:
    """Whose an `Idempotency-Key` is: the shop knows no users."""
    return ""


async def known_order(order_id: OrderId, session: Session) -> Order:
    """The order of the path."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"there is no order {order_id}")
    return order


KnownOrder = Annotated[Order, Depends(known_order)]


@router.post("", status_code=201, responses={201: PLACED, **problems(422)})
async def place_order(new: NewOrder, session: Session, response: Response) -> OrderAnswer:
    order = Order(sku=new.sku, quantity=new.quantity, invoice_number=None)
    session.add(order)
    await session.flush()
    response.headers["Location"] = f"/orders/{order.id}"
    return OrderAnswer.model_validate(order)


@router.get("/{order_id}", response_model=OrderAnswer, responses=polls() | problems(404, 422))
async def read_order(order: KnownOrder, session: Session, poll: Annotated[Poll, Depends(poll)]) -> Any:
    """The order; with `If-None-Match` and `Prefer: wait=N`, once it is no longer what the client has."""
    return await poll.changed(session, order) or poll.not_modified()


@router.post(
    "/{order_id}/fulfil",
    response_model=OrderAnswer,
    responses=replies(AcceptedOrder, links=ACCEPTED) | problems(400, 404, 409, 422, 500),
)
async def fulfil_order(
    order: KnownOrder,
    session: Session,
    once: Annotated[Idempotency, Depends(idempotency(caller=everybody))],
    reply: Annotated[Reply, Depends(reply)],
) -> Any:
    """Take stock and assign the next invoice number; answers when that has happened, or in `Prefer: wait=N` seconds."""
    await once.check(session)
    if order.status is not OrderStatus.PENDING:
        return order
    task = task_options(fulfilment.fulfil_order, unique_key=f"order {order.id}")
    job = await once.enqueue(session, task, order.id)
    await session.commit()
    settled = await reply.row(session, Order, order.id, columns=[Order.status], job=job)
    if settled is None:
        answer = OrderAnswer.model_validate(order).model_dump(mode="json")
        return await reply.accepted(session, job, location=f"/jobs/{job.id}", order=answer)
    return settled
