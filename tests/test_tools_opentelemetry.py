"""OpenTelemetry's instrumentation of FastAPI and SQLAlchemy sees every statement, in the trace of its request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from tests.pooler import UNTOLD
from tests.round_trip import application, rename, running

if TYPE_CHECKING:
    from asyncpg import Connection
    from opentelemetry.sdk.trace import ReadableSpan

pytestmark = pytest.mark.usefixtures("tables", "ledger")


def statement(span: ReadableSpan) -> str:
    found = dict(span.attributes or {})
    return " ".join(str(found.get("db.statement") or found.get("db.query.text") or "").split())


async def test_the_round_trip_is_seen_statement_by_statement(
    database_url: str, redis_url: str, observer: Connection
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = create_async_engine(database_url, pool_size=15, **UNTOLD)
    # Its bound is SQLAlchemy 2.0; it works on 2.1 when it is told to.
    instrumentor = SQLAlchemyInstrumentor()
    instrumentor.instrument(engine=engine.sync_engine, tracer_provider=provider, skip_dep_check=True)
    try:
        maker = async_sessionmaker(engine, expire_on_commit=False)
        app = application(maker, redis_url)
        FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
        async with running(app, [rename], maker, redis_url, database_url) as http:
            assert (await http.post("/users/1")).json() == "renamed"
    finally:
        instrumentor.uninstrument()
        await engine.dispose()
    spans = exporter.get_finished_spans()
    (request,) = [span for span in spans if span.name == "POST /users/{user_id}"]
    of_request = [statement(span) for span in spans if span.context.trace_id == request.context.trace_id]
    everywhere = [statement(span) for span in spans]
    for own in ("INSERT INTO users", "INSERT INTO coord_jobs", "SELECT 1, users.id"):  # the last is the wait's own read
        assert any(each.startswith(own) for each in of_request), (own, of_request)
    for by_worker in ("UPDATE coord_jobs SET state", "UPDATE users SET"):
        assert any(each.startswith(by_worker) for each in everywhere), (by_worker, everywhere)
    assert any("coord_lock(" in each for each in everywhere)
    trace = await observer.fetchval("SELECT trace ->> 'traceparent' FROM coord_jobs")
    assert trace.split("-")[1] == f"{request.context.trace_id:032x}"
