"""What is open while the application serves, and how little it says when it cannot start."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from api.deadline import in_time
from api.health import close_probes
from coord import Coordinator
from worker.database import engine, open_database, session_maker
from worker.environment import redis_url
from worker.startup import held_log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

CLOSE_SECONDS = 3.0

log = held_log("uvicorn", "uvicorn.error")


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    try:
        await open_database()
    except SystemExit as refusal:  # uvicorn makes its own exit of it, status 3, and would log a traceback
        print(refusal, file=sys.stderr)
        raise
    log.release()
    try:
        # No row of the shop depends on who asks, so that one read serves all who wait for orders.
        async with Coordinator(session_maker, redis=redis_url(), read_settings={}):
            yield
    finally:
        with suppress(TimeoutError):  # a PostgreSQL that says nothing does not hang up either
            await in_time(asyncio.gather(close_probes(), engine.dispose()), CLOSE_SECONDS)
