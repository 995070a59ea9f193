"""The heartbeat's own process: it says that its parent lives, as long as it can see that it does.

Run as a script, by its path, so that it imports little: the parent is told apart from one that is stopped by its event
loop's or its Python thread's ticks, or else by the processor time that it uses. It ends with its parent, whose death
and last jobs are the last that it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

BEAT_SECONDS = 2.0
LOOK_SECONDS = 0.25
"""Between two looks at the parent."""
UNNAMED_SECONDS = 0.5
"""How long a job runs before the next heartbeat, which names it, comes early."""
ALIVE_SECONDS = 1.0
"""Since the parent's last sign of life, after which nothing is said for it."""
HEALTH_SECONDS = 6
"""How long a heartbeat counts for `arq --check`."""
REDIS_SECONDS = 5.0
"""Since Redis last answered the parent, after which it is not healthy."""
BLOCKED_SECONDS = 2.0
"""Since the loop's last tick, after which a task is taken to block it."""
BEAT_TIMEOUT_SECONDS = 3.0
"""For both servers' answers to one look."""

_HEADER = struct.Struct("<5d")
_SLOT = struct.Struct("<16siid")
_FREE = bytes(16)


class Named(NamedTuple):
    id: UUID
    attempt: int
    task: int
    """Its place in the list of tasks."""
    started: float


class Board:
    """Memory that a worker shares with its heartbeat: when each last gave a sign, and what runs.

    Times are the system's monotonic clock's. What is written is there for the other at once, whatever holds Python's
    lock afterwards: a job is on the board before its first step.
    """

    def __init__(self, slots: int, file: int | None = None) -> None:
        """With no file that another has opened, of a new one."""
        size = _HEADER.size + slots * _SLOT.size
        if file is None:
            with tempfile.TemporaryFile() as made:
                made.truncate(size)
                file = os.dup(made.fileno())
        self.file = file
        self._memory = mmap.mmap(file, size)
        self._free = list(range(slots))

    def _get(self, place: int) -> Any:
        return _HEADER.unpack_from(self._memory)[place]

    def _set(self, place: int, value: float) -> None:
        struct.pack_into("<d", self._memory, 8 * place, value)

    loop_tick = property(lambda self: self._get(0), lambda self, value: self._set(0, value))
    thread_tick = property(lambda self: self._get(1), lambda self, value: self._set(1, value))
    beaten = property(lambda self: self._get(2), lambda self, value: self._set(2, value))
    redis_answered = property(lambda self: self._get(3), lambda self, value: self._set(3, value))

    stopping = property(lambda self: bool(self._get(4)), lambda self, value: self._set(4, value))

    @property
    def free(self) -> int:
        return len(self._free)

    def add(self, job: UUID, attempt: int, task: int) -> int:
        """The slot that it takes, to be given to `remove`."""
        slot = self._free.pop()
        start = _HEADER.size + slot * _SLOT.size
        struct.pack_into("<iid", self._memory, start + 16, attempt, task, time.monotonic())
        self._memory[start : start + 16] = job.bytes
        return slot

    def remove(self, slot: int) -> None:
        start = _HEADER.size + slot * _SLOT.size
        self._memory[start : start + 16] = _FREE
        self._free.append(slot)

    def jobs(self) -> Iterator[Named]:
        for id_, attempt, task, started in _SLOT.iter_unpack(self._memory[_HEADER.size :]):
            if id_ != _FREE:
                yield Named(UUID(bytes=id_), attempt, task, started)

    def close(self) -> None:
        """The memory goes with its last user: a thread may be about to write to it."""
        os.close(self.file)


class Beats:
    """Writes the heartbeat. Its connections to PostgreSQL commit each statement."""

    def __init__(self, board: Board, told: dict[str, Any], engine: Any, redis: Any, say: Callable[[str], None]) -> None:
        self._board = board
        self._told = told
        self._engine = engine
        self._redis = redis
        self._say = say
        self._processor, self._sign = -1, 0.0
        self._named: set[UUID] = set()
        self._statement = _statement(told["table"])
        self._healthy_at = 0.0

    async def run(self, stopped: Callable[[], bool]) -> None:
        while not stopped():
            try:
                async with asyncio.timeout(BEAT_TIMEOUT_SECONDS):
                    await self._look()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next beat is tried
                self._say(f"debug heartbeat: {type(error).__name__}: {error}")
            await asyncio.sleep(LOOK_SECONDS)

    async def last(self) -> None:
        """The parent has died: say so, and what it ran."""
        async with asyncio.timeout(BEAT_TIMEOUT_SECONDS):
            await self._write([*self._board.jobs()], dead=True)

    async def _look(self) -> None:
        now = time.monotonic()
        if not self._is_alive(now):
            return
        jobs = list(self._board.jobs())
        early = any(job.id not in self._named and now - job.started > UNNAMED_SECONDS for job in jobs)
        if early or now - self._board.beaten >= BEAT_SECONDS - LOOK_SECONDS:
            await self._beat(now, jobs)
        if now - self._healthy_at >= BEAT_SECONDS - LOOK_SECONDS:
            await self._say_healthy(now, jobs)

    def _is_alive(self, now: float) -> bool:
        """By the parent's last tick, or if it cannot tick by whether it has used processor time since the last look."""
        used = processor_time(self._told["pid"])
        if used > self._processor >= 0:
            self._sign = now
        self._processor = used
        self._sign = max(self._sign, self._board.loop_tick, self._board.thread_tick)
        return now - self._sign <= ALIVE_SECONDS

    async def _beat(self, now: float, jobs: list[Named]) -> None:
        if await self._write(jobs, dead=False) == 1:
            self._say("warning This worker was taken for dead and its jobs were given to others; it takes new ones")
        self._board.beaten = now
        self._named = {job.id for job in jobs}

    async def _write(self, jobs: list[Named], *, dead: bool) -> int:
        """How often the row on the list has been written; 1 of one that was not there."""
        now = {"jobs": self._as_json(jobs), "stopping": self._board.stopping, "dead": dead}
        async with self._engine.connect() as connection:
            return int((await connection.execute(self._statement, self._told["row"] | now)).scalar_one())

    def _as_json(self, jobs: list[Named]) -> str:
        past = time.time() - time.monotonic()
        named: dict[str, dict[str, Any]] = {
            str(job.id): {"attempt": job.attempt, "began": round(past + job.started, 3)} for job in jobs
        }
        for id_, progress in self._told.get("progress", {}).items():
            if id_ in named:
                named[id_]["progress"] = progress
        return json.dumps(named)

    async def _say_healthy(self, now: float, jobs: list[Named]) -> None:
        """Where the worker is, and which tasks run while its loop is blocked."""
        if min(now, self._board.loop_tick) - self._board.redis_answered > REDIS_SECONDS:
            return
        text = f"{time.strftime('%b-%d %H:%M:%S')} j_ongoing={len(jobs)}"
        if self._told.get("paused"):
            text += " paused"
        blocked = now - self._board.loop_tick
        if blocked > BLOCKED_SECONDS:
            running = sorted({self._told["tasks"][job.task] for job in jobs})
            text += f" blocked={blocked:.0f}s by one of: {', '.join(running)}"
        await self._redis.set(self._told["health_key"], text, px=HEALTH_SECONDS * 1000)
        self._healthy_at = now


def processor_time(pid: int) -> int:
    """Clock ticks that a process has used; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def main(file: int) -> None:
    """Be told by the first line on stdin; progress and new connection parameters come on later ones."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    first = sys.stdin.buffer.readline()
    if first:
        told, begun = json.loads(first), threading.Event()
        threading.Thread(target=_listen, args=(told, begun), daemon=True).start()
        sys.path[:] = told["path"]
        asyncio.run(_beat(told, begun, Board(told["slots"], file)))


async def _beat(told: dict[str, Any], begun: threading.Event, board: Board) -> None:
    beats = Beats(board, told, _engine(told), redis_of(told["redis"]), lambda line: print(line, flush=True))
    begun.set()
    await beats.run(lambda: os.getppid() != told["pid"] or "end" in told)
    if os.getppid() != told["pid"]:
        with contextlib.suppress(Exception):  # PostgreSQL may be gone as well: others find out by themselves
            await beats.last()


def _listen(told: dict[str, Any], begun: threading.Event) -> None:
    for line in sys.stdin.buffer:
        told |= json.loads(line)
        if "end" in told and not begun.is_set():
            os._exit(0)  # in the middle of the imports, for which a worker that stops would have to wait
    told["end"] = True


def _engine(told: dict[str, Any]) -> Any:
    """Whose connections are made as the parent's were."""
    from sqlalchemy import event
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine("postgresql+asyncpg://", pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")

    def as_parent(_dialect: Any, _record: Any, arguments: list[Any], parameters: dict[str, Any]) -> None:
        arguments[:], found = told["connect"]
        parameters.clear()
        parameters.update(found)

    event.listen(engine.sync_engine, "do_connect", as_parent)
    return engine


def _statement(table: str) -> Any:
    from sqlalchemy import text

    return text(f"""
        INSERT INTO {table} AS own (id, queue, host, pid, tasks, jobs, stopping, dead)
        VALUES (CAST(:id AS uuid), :queue, :host, :pid, CAST(:tasks AS json), CAST(:jobs AS json), :stopping, :dead)
        ON CONFLICT (id) DO UPDATE SET beats = own.beats + 1, beat_at = clock_timestamp(),
            jobs = excluded.jobs, stopping = excluded.stopping, dead = excluded.dead
        RETURNING beats
    """)


def redis_of(parameters: dict[str, Any]) -> Any:
    """A client, which connects to nothing yet."""
    from redis.asyncio import Redis
    from redis.asyncio.sentinel import Sentinel

    options = parameters["options"]
    if "url" in parameters:
        return Redis.from_url(parameters["url"], **options)
    if "sentinels" in parameters:
        sentinel: Any = Sentinel(map(tuple, parameters["sentinels"]), **options)  # type: ignore[no-untyped-call]
        return sentinel.master_for(parameters["master"])
    return Redis(**options)


if __name__ == "__main__":
    main(int(sys.argv[1]))
