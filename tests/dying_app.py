"""An API of one route, whose process is killed at one step of its first request, as by `kill -9`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from coord import Coordinator, Job, create_db_dependency
from coord.http import Idempotency, Reply, idempotency, problem_handlers, reply

STEP = os.environ.get("COORD_TEST_STEP")
MEANWHILE = 0.15
"""Seconds into the commit, which takes twice as long, when the process is killed."""

engine = create_async_engine(os.environ["COORD_DATABASE_URL"])
session_maker = async_sessionmaker(engine, expire_on_commit=False)
get_db = create_db_dependency(session_maker)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with Coordinator(session_maker, redis=os.environ["COORD_REDIS_URL"]):
        yield


app = FastAPI(lifespan=lifespan, exception_handlers=problem_handlers())


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def reached(step: str) -> None:
    if step == STEP:
        kill()


@app.post("/do")
async def do(
    session: Annotated[AsyncSession, Depends(get_db)],
    once: Annotated[Idempotency, Depends(idempotency(caller=lambda _: ""))],
    reply: Annotated[Reply, Depends(reply)],
) -> Any:
    job = await once.enqueue(session, "task")
    if not job.joined:
        await session.execute(text("INSERT INTO asked VALUES (:job)"), {"job": job.id})
    reached("enqueued")
    if STEP == "committing":
        threading.Timer(MEANWHILE, kill).start()
    await session.commit()
    reached("committed")
    row = await reply.row(session, Job, job.id, columns=[Job.state], job=job)
    reached("answering")
    return {"job": str(job.id), "state": None if row is None else row.state}
