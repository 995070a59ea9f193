"""Tasks of workers that run as processes: what they do is noted in a file, and they wait for files to go on."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from arq.worker import func
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from coord import create_ledger, job_transaction, lock_tables, worker_settings
from coord.jobs.attempt import ATTEMPT
from tests.models import Item, User
from tests.pooler import UNTOLD, create_engine

NOTES = Path(os.environ.get("COORD_TEST_NOTES", "/nonexistent"))
untold = UNTOLD["connect_args"] if os.environ.get("COORD_TEST_HEARTBEAT") == "thread" else {}
engine = create_engine(os.environ["COORD_DATABASE_URL"], pool_size=15, connect_args={"timeout": 5.0, **untold})
session_maker = async_sessionmaker(engine, expire_on_commit=False)


def note(ctx: dict[str, Any], what: str) -> None:
    """One write, so that lines of several processes do not mix."""
    attempt = ctx[ATTEMPT].number if ATTEMPT in ctx else 0
    file = os.open(NOTES / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{ctx['job_id']} {attempt} {os.getpid()} {what}\n".encode())
    finally:
        os.close(file)


async def allowed(name: str) -> None:
    while not (NOTES / name).exists():  # noqa: ASYNC110 - another process makes it
        await asyncio.sleep(0.03)


async def effect(session: Any, ctx: dict[str, Any]) -> None:
    statement = text("INSERT INTO effects (job, attempt, pid) VALUES (:job, :attempt, :pid)")
    attempt = ctx[ATTEMPT].number
    await session.execute(statement, {"job": ctx["job_id"], "attempt": attempt, "pid": os.getpid()})


async def quick(ctx: dict[str, Any]) -> None:
    note(ctx, "starts")
    async with job_transaction(ctx) as session:
        await effect(session, ctx)


async def hold(ctx: dict[str, Any], name: str) -> None:
    """Waits outside its transaction."""
    note(ctx, "starts")
    await allowed(name)
    async with job_transaction(ctx) as session:
        await effect(session, ctx)
    note(ctx, "ends")


async def hold_lock(ctx: dict[str, Any], name: str) -> None:
    """Waits holding a table's lock; it looks at the table meanwhile, so that it is never idle for long."""
    note(ctx, "starts")
    async with job_transaction(ctx) as session, lock_tables(session, [User], timeout=60):
        await effect(session, ctx)
        note(ctx, "locked")
        while not (NOTES / name).exists():
            await session.execute(text("SELECT 1"))
            await asyncio.sleep(0.02)
    note(ctx, "ends")


async def hold_transaction(ctx: dict[str, Any], name: str) -> None:
    note(ctx, "starts")
    async with job_transaction(ctx) as session:
        await effect(session, ctx)
        note(ctx, "entered")
        await allowed(name)


async def want_lock(ctx: dict[str, Any]) -> None:
    note(ctx, "starts")
    async with job_transaction(ctx) as session, lock_tables(session, [Item], timeout=60):
        await effect(session, ctx)


async def fail(ctx: dict[str, Any], name: str) -> None:
    note(ctx, "starts")
    await allowed(name)
    raise ValueError(name)


async def block(ctx: dict[str, Any], seconds: float) -> None:
    """Lets nothing else in the process's event loop happen for so long."""
    note(ctx, "starts")
    time.sleep(seconds)  # noqa: ASYNC251 - that is the point
    async with job_transaction(ctx) as session:
        await effect(session, ctx)
    note(ctx, "ends")


async def sleep(ctx: dict[str, Any], seconds: float) -> None:
    note(ctx, "starts")
    await asyncio.sleep(seconds)


async def linger(ctx: dict[str, Any]) -> None:
    """Goes on for long after its effect was applied."""
    async with job_transaction(ctx) as session:
        await effect(session, ctx)
    note(ctx, "applied")
    await asyncio.sleep(60)


async def deadly(ctx: dict[str, Any]) -> None:
    note(ctx, "starts")
    os.kill(os.getpid(), signal.SIGKILL)


async def poison(ctx: dict[str, Any]) -> None:
    """Kills its worker, when that has named it; the kernel would kill what else is in its container."""
    note(ctx, "starts")
    await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


async def slow(ctx: dict[str, Any], seconds: float) -> None:
    note(ctx, "starts")
    await asyncio.sleep(seconds)
    async with job_transaction(ctx) as session:
        await effect(session, ctx)


async def count(ctx: dict[str, Any], seconds: float) -> None:
    """Holds the interpreter's lock for about so long."""
    note(ctx, "starts")
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        sum(range(10**8))


async def fork(ctx: dict[str, Any]) -> None:
    """Has a child, which is told to end."""
    note(ctx, "starts")
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    await asyncio.sleep(0.3)
    child.terminate()
    await asyncio.to_thread(child.join)
    note(ctx, f"child ended with {child.exitcode}")


async def plain(ctx: dict[str, Any], name: str) -> None:
    """A function that knows nothing of ledgers."""
    note(ctx, "starts")
    await allowed(name)
    note(ctx, "ends")


async def loop(ctx: dict[str, Any]) -> None:
    note(ctx, type(asyncio.get_running_loop()).__module__)


async def on_startup(ctx: dict[str, Any]) -> None:
    async with engine.begin() as connection:
        await create_ledger(connection)


async def on_shutdown(ctx: dict[str, Any]) -> None:
    await engine.dispose()


TASKS: list[Any] = [quick, hold, hold_lock, hold_transaction, want_lock, fail, block, sleep, linger, plain, loop]
TASKS += [poison, slow, count, fork]
TASKS.append(func(deadly, max_tries=2))

Settings = worker_settings(
    TASKS,
    session_maker=session_maker,
    redis=os.environ["COORD_REDIS_URL"],
    grace=float(os.environ.get("COORD_TEST_GRACE", "20")),
    idle_limit=float(os.environ.get("COORD_TEST_IDLE_LIMIT", "60")),
    max_jobs=int(os.environ.get("COORD_TEST_MAX_JOBS", "10")),
    on_startup=on_startup,
    on_shutdown=on_shutdown,
)
