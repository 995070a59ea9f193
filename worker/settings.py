"""What `arq worker.Settings` runs."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import Any, ClassVar

from coord import Coordinator
from worker.database import MAX_JOBS, close_database, session_maker
from worker.environment import redis_settings
from worker.fulfilment import fulfil_order
from worker.retries import MAX_TRIES
from worker.startup import AtFirstConnection, open_shop


def to_json(message: dict[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode()  # arq puts exceptions in, too


async def on_startup(ctx: dict[str, Any]) -> None:
    """From now on the commits of this process wake whoever waits for their rows."""
    ctx["coordinator"] = await Coordinator(session_maker, redis=ctx["redis"]).__aenter__()


async def on_shutdown(ctx: dict[str, Any]) -> None:
    await ctx["coordinator"].__aexit__(None, None, None)
    await close_database()


class Settings:
    """arq reads this class's own dictionary: what is inherited it would not see."""

    functions: ClassVar = [fulfil_order]
    redis_settings = replace(redis_settings(), retry=AtFirstConnection(open_shop))
    job_serializer = to_json
    job_deserializer = json.loads
    on_startup = on_startup
    on_shutdown = on_shutdown
    max_jobs = MAX_JOBS
    max_tries = MAX_TRIES
    job_timeout = 30
    job_completion_wait = 5  # seconds that SIGTERM leaves running jobs
    keep_result = 0  # the answer is in the row
    poll_delay = 0.02
    health_check_interval = 10
    health_check_key = f"shop:worker:{socket.gethostname()}"
