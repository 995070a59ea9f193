"""The application: its routes, its error answers, and what is open while it serves."""

from __future__ import annotations

from fastapi import FastAPI

from api import events, health, orders, stock
from api.sessions import get_db
from api.startup import lifespan
from coord.console import console
from coord.http import HeadRequests, RequestLimits, job_routes, job_status_routes, problem_handlers, problems
from worker.database import session_maker
from worker.environment import admin_token, console_read_token, console_token, is_development
from worker.metrics import metrics

app = FastAPI(
    title="coord's shop",
    lifespan=lifespan,
    exception_handlers=problem_handlers(),
    responses=problems(),
    generate_unique_id_function=lambda route: route.name,
)
app.add_middleware(HeadRequests)
app.add_middleware(RequestLimits, server_timing=True)
app.include_router(job_status_routes(get_db))
app.include_router(metrics.routes(session_maker))
for module in (orders, events, stock, health):
    app.include_router(module.router)
if (token := admin_token()) is not None or is_development():
    app.include_router(job_routes(get_db, token=token))
app.mount("/console", console(session_maker, full_token=console_token(), read_token=console_read_token()))
