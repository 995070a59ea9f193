"""The heartbeat: a process beside the worker says that it lives, also while a task lets nothing else run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import delete, event, insert
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from coord.database.engine import engine_of
from coord.jobs.model import workers
from coord.worker.freshness import TICK_SECONDS
from coord.worker.maintenance import beat
from coord.worker.maintenance.beat import Beats, Board, redis_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from coord.worker.config import WorkerConfig
    from coord.worker.running import RunningJobs

logger = logging.getLogger("arq.coord")

CREDIBLE_SECONDS = 5.0
"""Since the last heartbeat, after which others may soon take this worker for dead."""
END_SECONDS = 2.0
"""For the process, or the thread, to end."""
RESTART_SECONDS = 1.0
UNDEFINED_TABLE = "42P01"


class Heartbeat:
    """The worker is on the list within the block; the board is there before.

    `tick` is called by the event loop every quarter second.
    """

    def __init__(
        self, config: WorkerConfig, worker: UUID, tick: Callable[[], None], is_paused: Callable[[], bool]
    ) -> None:
        self._config = config
        self._worker = worker
        self._tick = tick
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the block's end
        self._file.truncate(Board.size(config.max_jobs))
        self.board = Board(self._file.fileno(), config.max_jobs)
        self.running: RunningJobs | None = None
        self._is_paused = is_paused
        self._connect: Any = None
        """How the application's connections are made, as far as another process can be told."""
        self._process: asyncio.subprocess.Process | None = None
        self._sent: dict[str, Any] = {}
        self._ended = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_credible(self) -> bool:
        """Whether others know that this worker lives."""
        return bool(time.monotonic() - self.board.beaten < CREDIBLE_SECONDS)

    async def __aenter__(self) -> Self:
        event.listen(engine_of(self._config.session_maker).sync_engine, "do_connect", self._note_connect)
        try:
            await self._enrol()
        except BaseException:
            await self.__aexit__()
            raise
        self.board.loop_tick = self.board.redis_answered = time.monotonic()
        threading.Thread(target=self._tick_in_thread, name="coord heartbeat ticks", daemon=True).start()
        self._spawn(self._tick_in_loop())
        if self._connect is None or not sys.executable:
            logger.warning("The heartbeat is a thread: what a connection needs cannot be passed to another process")
            self._spawn(asyncio.to_thread(asyncio.run, self._beat_here()))
        else:
            self._spawn(self._beat_in_process())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Off the list, once nothing can put the worker back on it."""
        self._ended = True
        event.remove(engine_of(self._config.session_maker).sync_engine, "do_connect", self._note_connect)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(_line({"end": True}))
            self._process.stdin.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_SECONDS)
        self._kill()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_SECONDS)
        self._file.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._execute(delete(workers).where(workers.c.id == self._worker))
        except Exception as error:  # noqa: BLE001 - who looks after the queue finds out in some seconds
            logger.debug("This worker is still on the list: %s", error)

    def _spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work, name="coord heartbeat"))

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _enrol(self) -> None:
        """Be on the list. Somebody else, started together with this worker, may only be making the tables."""
        own = {"id": self._worker, "queue": self._config.queue, "host": socket.gethostname(), "pid": os.getpid()}
        row = insert(workers).values({**own, "jobs": {}, "tasks": self._config.signatures})
        pause = 0.1
        while True:
            began = time.monotonic()
            try:
                await self._execute(row)
            except ProgrammingError as error:
                if getattr(error.orig, "sqlstate", None) != UNDEFINED_TABLE:
                    raise
            else:
                self.board.beaten = began
                return
            if pause == 0.1:
                logger.warning("The ledger's tables are missing; waiting for them: `coord schema --apply` makes them")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2.0)

    async def _execute(self, statement: Any) -> None:
        """By a connection of its own, which tells how one is made."""
        engine = another(engine_of(self._config.session_maker)).execution_options(isolation_level="AUTOCOMMIT")
        try:
            async with engine.connect() as connection:
                await connection.execute(statement)
        finally:
            await engine.dispose()

    def _note_connect(self, _dialect: Any, _record: Any, arguments: list[Any], parameters: dict[str, Any]) -> None:
        found = [[*arguments], dict(parameters)]
        self._connect = found if _is_plain(found) else None

    async def _tick_in_loop(self) -> None:
        while not self._ended:
            self.board.loop_tick = time.monotonic()
            self._tick()
            self._send_news()
            await asyncio.sleep(TICK_SECONDS)

    def _tick_in_thread(self) -> None:
        while not self._ended:
            self.board.thread_tick = time.monotonic()
            time.sleep(TICK_SECONDS)

    def _news(self) -> dict[str, Any]:
        running = () if self.running is None else self.running
        progress = {str(job.message.id): job.attempt.progress for job in running if job.attempt.progress is not None}
        return {"progress": progress, "connect": self._connect, "paused": self._is_paused()}

    def _send_news(self) -> None:
        news = self._news()
        if self._process is None or self._process.stdin is None or self._process.stdin.is_closing():
            self._sent.update(news)
        elif news != {name: self._sent.get(name) for name in news} and news["connect"] is not None:
            self._process.stdin.write(_line(news))
            self._sent = {**self._sent, **news}

    def _told(self) -> dict[str, Any]:
        """What the heartbeat has to know; `_sent` is it, so that in a thread it sees the news."""
        config = self._config
        row = {"own_queue": config.queue, "own_host": socket.gethostname(), "own_pid": os.getpid()}
        self._sent |= {
            "path": [entry for entry in sys.path if isinstance(entry, str)],
            "pid": os.getpid(),
            "slots": config.max_jobs,
            "worker": self._worker.hex,
            "schema": workers.schema,
            "tasks": [*config.tasks],
            "health_key": config.health_check_key,
            "redis": config.address.parameters(),
            "row": {**row, "own_tasks": json.dumps(config.signatures)},
            **self._news(),
        }
        return self._sent

    async def _beat_in_process(self) -> None:
        while not self._ended:
            try:
                await self._run_process()
            except Exception:
                logger.exception("The heartbeat's process has failed, and is started again")
                self._kill()
            if not self._ended:
                await asyncio.sleep(RESTART_SECONDS)

    async def _run_process(self) -> None:
        told = self._told()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            beat.__file__,
            str(self._file.fileno()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[self._file.fileno()],
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(_line(told))
        async for line in self._process.stdout:
            level, _, text = line.decode(errors="replace").strip().partition(" ")
            logger.log(logging.WARNING if level == "warning" else logging.DEBUG, "%s", text)
        status = await self._process.wait()
        if not self._ended:
            logger.warning("The heartbeat's process has ended with status %d, and is started again", status)

    async def _beat_here(self) -> None:
        """In an event loop of its own."""
        told = self._told()
        engine = another(engine_of(self._config.session_maker)).execution_options(isolation_level="AUTOCOMMIT")
        redis = redis_of(told["redis"])
        try:
            beats = Beats(self.board, told, engine, redis, lambda line: logger.warning("%s", line.partition(" ")[2]))
            await beats.run(lambda: self._ended)
        finally:
            await engine.dispose()
            await redis.aclose()


def another(engine: AsyncEngine) -> AsyncEngine:
    """With connections of its own, which are made as the given one's are."""
    return create_async_engine(engine.url, pool=engine.pool.recreate())


def _line(told: dict[str, Any]) -> bytes:
    return json.dumps(told).encode() + b"\n"


def _is_plain(found: Any) -> bool:
    """Whether another process can be told."""
    try:
        return bool(json.loads(json.dumps(found)) == found)
    except (TypeError, ValueError):
        return False
