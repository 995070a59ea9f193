"""The application: its routes, its error answers, and what is open while it serves."""

from __future__ import annotations

from fastapi import FastAPI

from api import health, jobs, orders, problems, stock
from api.startup import lifespan

app = FastAPI(title="coord's shop", lifespan=lifespan, exception_handlers=problems.HANDLERS)
app.include_router(orders.router)
app.include_router(jobs.router)
app.include_router(stock.router)
app.include_router(health.router)
