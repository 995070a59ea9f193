"""Whether this process can do its work."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from api.deadline import in_time
from coord import redis_from_url
from worker.database import engine
from worker.environment import redis_url

if TYPE_CHECKING:
    from collections.abc import Awaitable

SECONDS = 2.0

State = Literal["ok", "down"]
router = APIRouter(tags=["health"])
# Connections of their own: one that waits for a busy pool would call a busy process a sick one.
probe = create_async_engine(engine.url, pool_size=1, max_overflow=0, pool_pre_ping=True)
redis = redis_from_url(redis_url(), socket_connect_timeout=SECONDS, socket_timeout=SECONDS)


async def close_probes() -> None:
    await redis.aclose()
    await probe.dispose()


class Health(BaseModel):
    postgresql: State
    redis: State


@router.get("/healthz", responses={503: {"model": Health}})
async def healthz(response: Response) -> Health:
    """Without Redis the shop still takes orders; without PostgreSQL it does nothing."""
    postgresql, feed = await asyncio.gather(_state(_select()), _state(redis.ping()))
    response.status_code = 200 if postgresql == "ok" else 503
    return Health(postgresql=postgresql, redis=feed)


async def _select() -> None:
    async with probe.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def _state(check: Awaitable[object]) -> State:
    try:
        await in_time(check, SECONDS)
    except Exception:  # noqa: BLE001 - whatever keeps it from answering
        return "down"
    return "ok"
