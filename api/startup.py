"""What is open while the application serves, and how little it says when it cannot start."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from api.health import close_probes
from coord import Coordinator
from worker.database import close_database, open_database, session_maker
from worker.environment import redis_url
from worker.startup import held_log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

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
        await close_probes()
        await close_database()
