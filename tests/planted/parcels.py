"""Parcels that get labels, with numbers from 1 on; it runs in a copy of the library that may have a bug."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from arq.worker import Retry
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import coord
from coord import (
    Coordinator,
    WaitTimeoutError,
    create_db_dependency,
    create_ledger,
    enqueue,
    job_transaction,
    lock_tables,
    retry_job,
    task_options,
    wait_for_row_change,
    watch_row,
    worker_settings,
)
from coord.http import problem_handlers
from coord.http.reply import Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

if not Path(coord.__file__).is_relative_to(Path.cwd()):
    raise SystemExit(f"this is not the copy: {coord.__file__}")

REDIS_URL = os.environ["COORD_REDIS_URL"]
engine = create_async_engine(os.environ["COORD_DATABASE_URL"], pool_size=12, max_overflow=0)
session_maker = async_sessionmaker(engine, expire_on_commit=False)
get_db = create_db_dependency(session_maker=session_maker)
DEPENDS = Depends(get_db)
# A commit that takes its time, and one that is refused: by the name of what is inserted.
ON_COMMIT = """
    CREATE OR REPLACE FUNCTION on_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.name LIKE 'slow%' THEN PERFORM pg_sleep(0.5); END IF;
        IF NEW.name LIKE 'refused%' THEN RAISE EXCEPTION 'refused'; END IF;
        RETURN NULL;
    END $$
"""
TRIGGER = """
    CREATE CONSTRAINT TRIGGER on_commit AFTER INSERT ON parcels DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION on_commit()
"""


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcels"
    name: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[int | None]
    step: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


class Label(Base):
    """One was put on a parcel."""

    __tablename__ = "labels"
    id: Mapped[int] = mapped_column(primary_key=True)
    parcel: Mapped[str]
    number: Mapped[int]


tried: set[str] = set()
"""In this process, of those that are to be tried again."""


async def label(ctx: dict[str, Any], name: str, plan: dict[str, Any]) -> None:
    """`plan` says what happens on the way, and for how many seconds."""
    if plan.get("retries") and name not in tried:
        tried.add(name)
        raise Retry(defer=plan["retries"])
    await asyncio.sleep(plan.get("before", 0))
    number = await _next_number(plan) if plan.get("reads outside") else 0
    with suppress(ValueError) if plan.get("swallows") else nullcontext():
        async with job_transaction(ctx) as session:
            async with nullcontext() if number else lock_tables(session, [Parcel], timeout=30.0):
                await _put(session, name, plan, number)
    await asyncio.sleep(plan.get("after", 0))


async def _put(session: AsyncSession, name: str, plan: dict[str, Any], number: int) -> None:
    last = await session.scalar(select(func.max(Parcel.label)))
    await session.execute(text("SELECT pg_sleep(:inside)"), {"inside": plan.get("inside", 0.0)})
    parcel = await session.get_one(Parcel, name)
    parcel.label = number or (last or 0) + 1
    session.add(Label(parcel=name, number=parcel.label))
    await session.flush()
    if plan.get("swallows"):
        raise ValueError("the printer is out of paper")


async def _next_number(plan: dict[str, Any]) -> int:
    """Good for who runs alone."""
    async with session_maker() as session:
        last = await session.scalar(select(func.max(Parcel.label)))
    await asyncio.sleep(plan["reads outside"])
    return (last or 0) + 1


def shown(parcel: Parcel) -> dict[str, Any]:
    return {"name": parcel.name, "label": parcel.label, "version": parcel.version}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await create_tables({})
    async with Coordinator(session_maker, redis=REDIS_URL, read_settings={}):
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan, exception_handlers=problem_handlers())


@app.post("/parcels")
async def post(request: Request, plan: dict[str, Any], session: AsyncSession = DEPENDS) -> Any:
    """A parcel and the job to label it; answers when it has its label."""
    parcel = Parcel(name=plan["name"], label=None)
    session.add(parcel)
    await session.flush()
    task = task_options(label, unique_key=plan.get("unique_key"), one_at_a_time=plan.get("one_at_a_time"))
    job = await enqueue(session, task, parcel.name, plan)
    await asyncio.sleep(plan.get("commits after", 0))
    await session.commit()
    await asyncio.sleep(plan.get("waits after", 0))
    found: Parcel | None
    if plan.get("without its job"):
        found = await _changed(session, parcel.name, plan["wait"])
    else:
        found = await Reply(request, JSONResponse({})).row(
            session, Parcel, parcel.name, columns=[Parcel.label], job=job
        )
    return JSONResponse({"job": str(job.id), **shown(parcel)}, 202) if found is None else shown(found)


async def _changed(session: AsyncSession, name: str, wait: float) -> Parcel | None:
    with suppress(WaitTimeoutError):
        return await wait_for_row_change(session, Parcel, name, columns=[Parcel.label], timeout=wait)
    return None


@app.put("/parcels/{name}", status_code=201)
async def put(name: str, swallows: bool = False, session: AsyncSession = DEPENDS) -> dict[str, Any]:
    """A parcel and nothing else, committed by the session."""
    parcel = Parcel(name=name, label=None)
    session.add(parcel)
    await session.flush()
    if swallows:
        with suppress(Exception):
            await session.execute(text("SELECT 1 / 0"))
    return shown(parcel)


@app.post("/parcels/{name}/steps")
async def step(name: str, session: AsyncSession = DEPENDS) -> dict[str, Any]:
    parcel = await session.get_one(Parcel, name)
    parcel.step += 1
    await session.flush()
    return shown(parcel)


@app.get("/parcels/{name}")
async def get(name: str, seconds: float = 0, session: AsyncSession = DEPENDS) -> dict[str, Any]:
    """The parcel; or as it is after a change, if one comes in time, as a long poll has it."""
    parcel = await session.get(Parcel, name)
    if parcel is None:
        raise HTTPException(404)
    return shown(await _changed(session, name, seconds) or parcel) if seconds else shown(parcel)


@app.get("/parcels/{name}/events")
async def events(name: str) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        async with session_maker() as session, watch_row(session, Parcel, name, timeout=5.0) as states:
            async for parcel in states:
                yield f"{parcel.version}\n"

    return StreamingResponse(lines())


@app.post("/jobs/{job_id}/retry")
async def again(job_id: UUID, session: AsyncSession = DEPENDS) -> dict[str, str]:
    try:
        await retry_job(session, job_id)
    except ValueError as error:
        raise HTTPException(409, str(error)) from error
    return {}


async def create_tables(_ctx: dict[str, Any]) -> None:
    async with engine.begin() as connection:
        await create_ledger(connection)  # under a lock
        if await connection.scalar(text("SELECT to_regclass('parcels')")) is None:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(text(ON_COMMIT))
            await connection.execute(text(TRIGGER))


Settings = worker_settings(
    [label], session_maker=session_maker, redis=REDIS_URL, grace=0.5, max_jobs=10, on_startup=create_tables
)
