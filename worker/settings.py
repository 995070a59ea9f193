"""What `arq worker.Settings` runs."""

from __future__ import annotations

from typing import Any

from coord import worker_settings
from worker.database import MAX_JOBS, close_database, open_database, session_maker
from worker.environment import redis_url
from worker.fulfilment import fulfil_order
from worker.startup import held_log

log = held_log("arq.worker", "arq.connections")


async def on_startup(ctx: dict[str, Any]) -> None:
    await open_database()
    log.release()


async def on_shutdown(ctx: dict[str, Any]) -> None:
    await close_database()


Settings = worker_settings(
    [fulfil_order],
    session_maker=session_maker,
    redis=redis_url(),
    max_jobs=MAX_JOBS,
    job_timeout=30,
    on_startup=on_startup,
    on_shutdown=on_shutdown,
)
