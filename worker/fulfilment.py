"""The task: take stock and assign the next invoice number, alone with both tables."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select

from coord import job_transaction, lock_tables
from worker.models import Order, OrderStatus, Stock

_last_invoice = select(func.coalesce(func.max(Order.invoice_number), 0)).correlate(None).scalar_subquery()
_statement = select(Order, Stock, _last_invoice).outerjoin(Stock, Stock.sku == Order.sku)


async def fulfil_order(ctx: dict[str, Any], order_id: int) -> None:
    """Fulfil or reject a pending order, once however often it is asked for: the lock makes the status the truth.

    Everything between the lock and the commit is what all other orders wait for: one read, two writes.
    """
    async with job_transaction(ctx) as session, lock_tables(session, [Stock, Order]):
        found = (await session.execute(_statement.where(Order.id == order_id))).one_or_none()
        if found is None or found.Order.status is not OrderStatus.PENDING:
            return
        order, stock, last_invoice = found
        if stock is None or stock.quantity < order.quantity:
            order.status = OrderStatus.REJECTED
            return
        stock.quantity -= order.quantity
        order.status = OrderStatus.FULFILLED
        order.invoice_number = last_invoice + 1
