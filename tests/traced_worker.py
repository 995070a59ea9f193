"""The tasks of a worker whose process has OpenTelemetry's SDK, and notes its spans when it stops."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from arq import Retry
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import enqueue, job_transaction, lock_tables, worker_settings
from tests.models import User

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
maker = async_sessionmaker(create_async_engine(os.environ["COORD_DATABASE_URL"]), expire_on_commit=False)


async def rename(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [User]):
        (await session.get_one(User, user_id)).name = "done"
        await enqueue(session, follow)


async def follow(ctx: dict[str, Any]) -> None:
    """Is tried twice, and fails."""
    if ctx["job_try"] == 1:
        raise Retry
    raise LookupError("nothing to follow")


async def on_shutdown(ctx: dict[str, Any]) -> None:
    path = Path(os.environ["COORD_TEST_NOTES"]) / "spans"
    path.write_text(json.dumps([json.loads(span.to_json()) for span in exporter.get_finished_spans()]))


Settings = worker_settings(
    [rename, follow], session_maker=maker, redis=os.environ["COORD_REDIS_URL"], on_shutdown=on_shutdown
)
