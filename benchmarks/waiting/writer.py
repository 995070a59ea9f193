"""A process that commits changes of one row each, through many connections at once, when its parent says so."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.loop import run
from benchmarks.waiting.stage import Order
from coord import Coordinator, create_db_context

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from multiprocessing.connection import Connection

    import asyncpg

    from benchmarks.waiting.stage import Stage

    Commit = Callable[[int], Awaitable[None]]
    """Changes the order with this id."""
    Sessions = async_sessionmaker[AsyncSession]

ROWS = 50
"""Orders that a connection changes in turn, and nobody else."""


@dataclass(frozen=True, slots=True)
class Turn:
    """To write from `begin` to `end`, on the system's monotonic clock, and count what is committed after `count`."""

    begin: float
    count: float
    end: float


@dataclass(frozen=True, slots=True)
class Crew:
    """Writers that write at once."""

    processes: int
    connections: int
    """Of each process."""
    plain: bool = False
    """With asyncpg and one statement, rather than with SQLAlchemy's sessions."""


class Way(StrEnum):
    BARE = "the same without coord"
    OFF = "nothing rung"
    BELL = "coord's bell"
    TRIGGER = "NOTIFY in a row trigger"


def main(pipe: Connection, stage: Stage, crew: Crew, number: int) -> None:
    """Answer a `Way` with "ready", and then a `Turn` with the commits in it, until the parent is gone."""
    run(_main(pipe, stage, crew, number * crew.connections))


async def _main(pipe: Connection, stage: Stage, crew: Crew, first: int) -> None:
    async with AsyncExitStack() as stack:
        plain = [await stack.enter_async_context(stage.connection()) for _ in range(crew.connections * crew.plain)]
        bare, silent, rung = [await _sessions(stack, stage, crew) for _ in range(3)]
        one = {Way.BARE: _bare(bare), Way.BELL: _coord(rung)}
        while True:
            try:
                way = Way(await asyncio.to_thread(pipe.recv))
            except EOFError:
                return
            async with Coordinator(rung, redis=stage.redis_url) if way is Way.BELL else nullcontext():
                commits = [*map(_plain, plain)] or [one.get(way, _coord(silent))] * crew.connections
                pipe.send("ready")
                turn = await asyncio.to_thread(pipe.recv)
                done = await asyncio.gather(*(_write(commit, first + n, turn) for n, commit in enumerate(commits)))
                pipe.send(sum(done))


async def _sessions(stack: AsyncExitStack, stage: Stage, crew: Crew) -> Sessions:
    """With an engine of their own, since coord leaves its listeners on those that it has met."""
    engine = await stack.enter_async_context(stage.engine("writer", crew.connections))
    return async_sessionmaker(engine, expire_on_commit=False)


def _bare(sessions: Sessions) -> Commit:
    async def commit(key: int) -> None:
        async with sessions.begin() as session:
            order = await session.get_one(Order, key)
            order.quantity += 1

    return commit


def _coord(sessions: Sessions) -> Commit:
    context = create_db_context(sessions)

    async def commit(key: int) -> None:
        async with context() as session:
            order = await session.get_one(Order, key)
            order.quantity += 1

    return commit


def _plain(connection: asyncpg.Connection) -> Commit:
    async def commit(key: int) -> None:
        await connection.execute("UPDATE orders SET quantity = quantity + 1 WHERE id = $1", key)

    return commit


async def _write(commit: Commit, number: int, turn: Turn) -> int:
    await asyncio.sleep(turn.begin - time.monotonic())
    done = row = 0
    while time.monotonic() < turn.end:
        await commit(1 + number * ROWS + row)
        row = (row + 1) % ROWS
        done += turn.count <= time.monotonic() <= turn.end
    return done
