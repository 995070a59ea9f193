"""A process that commits changes of one row each, through many connections at once, when its parent says so."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.waiting.stage import Order, run
from coord import Coordinator

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


def main(pipe: Connection, stage: Stage, crew: Crew, number: int) -> None:
    """Answer whether to ring with "ready", and then a `Turn` with the commits in it, until the parent is gone."""
    run(_main(pipe, stage, crew, number * crew.connections))


async def _main(pipe: Connection, stage: Stage, crew: Crew, first: int) -> None:
    async with AsyncExitStack() as stack:
        plain, silent, rung = await _writers(stack, stage, crew)
        while True:
            try:
                ring = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            async with Coordinator(rung, redis=stage.redis_url) if ring else nullcontext():
                commits = plain or [_session(rung if ring else silent)] * crew.connections
                pipe.send("ready")
                turn = await asyncio.to_thread(pipe.recv)
                done = await asyncio.gather(*(_write(commit, first + n, turn) for n, commit in enumerate(commits)))
                pipe.send(sum(done))


async def _writers(stack: AsyncExitStack, stage: Stage, crew: Crew) -> tuple[list[Commit], Sessions, Sessions]:
    """An engine that a Coordinator has had is told apart from one that has never met any."""
    plain = [await stack.enter_async_context(stage.connection()) for _ in range(crew.connections if crew.plain else 0)]
    engines = [await stack.enter_async_context(stage.engine("writer", crew.connections)) for _ in range(2)]
    silent, rung = (async_sessionmaker(engine, expire_on_commit=False) for engine in engines)
    return [_plain(connection) for connection in plain], silent, rung


def _plain(connection: asyncpg.Connection) -> Commit:
    async def commit(key: int) -> None:
        await connection.execute("UPDATE orders SET quantity = quantity + 1 WHERE id = $1", key)

    return commit


def _session(sessions: Sessions) -> Commit:
    async def commit(key: int) -> None:
        async with sessions() as session:
            order = await session.get_one(Order, key)
            order.quantity += 1
            await session.commit()

    return commit


async def _write(commit: Commit, number: int, turn: Turn) -> int:
    await asyncio.sleep(turn.begin - time.monotonic())
    done = row = 0
    while time.monotonic() < turn.end:
        await commit(1 + number * ROWS + row)
        row = (row + 1) % ROWS
        done += turn.count <= time.monotonic() <= turn.end
    return done
