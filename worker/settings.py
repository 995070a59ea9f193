"""What `arq worker.Settings` runs."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from typing import Any

from coord import worker_settings
from worker.database import MAX_JOBS, open_database, session_maker
from worker.environment import redis_url
from worker.fulfilment import fulfil_order
from worker.metrics import serve_metrics
from worker.startup import held_log, is_run_by

# Where arq runs this, and nobody else's loop is concerned; it takes its own from the policy.
if is_run_by("arq") and importlib.util.find_spec("uvloop") is not None:
    asyncio.set_event_loop_policy(importlib.import_module("uvloop").EventLoopPolicy())

log = held_log("arq", "arq.worker", "arq.connections")


async def on_startup(ctx: dict[str, Any]) -> None:
    await open_database()
    serve_metrics()
    log.release()


def serialize(value: Any) -> bytes:
    """For arq's own jobs: it would unpickle whatever somebody has written into its queue."""
    return json.dumps(value).encode()


Settings = worker_settings(
    [fulfil_order],
    session_maker=session_maker,
    redis=redis_url(),
    max_jobs=MAX_JOBS,
    job_timeout=30,
    job_serializer=serialize,
    job_deserializer=json.loads,
    on_startup=on_startup,
)
