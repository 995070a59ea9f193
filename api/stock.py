"""How much of what there is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.dialects.postgresql import insert

from api.links import STOCKED
from api.sessions import Session
from coord.http import problems
from worker.models import Stock

Sku = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]

Quantity = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]

router = APIRouter(prefix="/stock", tags=["stock"])


class Level(BaseModel):
    quantity: Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)]


class StockAnswer(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    sku: str
    quantity: int


@router.put("/{sku}", responses={200: STOCKED, **problems(422)})
async def put_stock(sku: Sku, level: Level, session: Session) -> StockAnswer:
    """One statement, which waits for whoever is fulfilling an order and then sets the level."""
    new = insert(Stock).values(sku=sku, quantity=level.quantity)
    upsert = new.on_conflict_do_update(index_elements=[Stock.sku], set_={"quantity": new.excluded.quantity})
    await session.execute(upsert)
    return StockAnswer(sku=sku, quantity=level.quantity)


@router.get("/{sku}", responses=problems(404, 422))
async def read_stock(sku: Sku, session: Session) -> StockAnswer:
    stock = await session.get(Stock, sku)
    if stock is None:
        raise HTTPException(404, f"{sku} was never stocked")
    return StockAnswer.model_validate(stock)
