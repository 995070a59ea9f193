"""The heartbeat: a process beside the worker says that it lives, also while a task lets nothing else run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from itertools import count
from typing import Any, Self

from sqlalchemy import delete, event, insert, table
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ProgrammingError

from coord.database.engine import another, dispose
from coord.database.place import known_schema
from coord.jobs.model import ledger_engine, workers
from coord.retryable import sqlstate_of
from coord.worker.failure import backoff
from coord.worker.maintenance import beat
from coord.worker.maintenance.beat import Beats, redis_of
from coord.worker.maintenance.loops import Loop
from coord.worker.state import WorkerState

logger = logging.getLogger("arq.coord")

_PREPARER = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
TICK_SECONDS = 0.25
"""Between two signs of life."""
PROCESS_END_SECONDS = 2.0
"""For the process, or the thread, to end; and then for the worker to be taken off the list."""
RESTART_SECONDS = 1.0
"""After which a process that has ended is started again."""
TABLES_PAUSE_SECONDS = (0.1, 2.0)
"""Before the first look whether the tables are there now, and before any later one at most."""
UNDEFINED_TABLE = "42P01"


class Heartbeat(Loop):
    """The worker is on the list within the block. Each round is a sign of life, for the process that says so."""

    interval = TICK_SECONDS

    def __init__(self, state: WorkerState) -> None:
        super().__init__(state)
        self._engine = ledger_engine(state.config.session_maker)
        self._row: dict[str, Any] = {"queue": state.keys.queue, "host": socket.gethostname(), "pid": os.getpid()}
        self._connect: Any = None
        """How the application's connections are made, as far as another process can be told."""
        self._told: dict[str, Any] = {}
        """What the process, or the thread, knows."""
        self._process: asyncio.subprocess.Process | None = None
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        event.listen(self._engine.sync_engine, "do_connect", self._note_connect)
        try:
            await self._enrol()
        except BaseException:
            await self._leave()
            raise
        board = self._state.board
        board.loop_tick = board.redis_answered = time.monotonic()
        threading.Thread(target=self._tick_in_thread, name="coord heartbeat ticks", daemon=True).start()
        self._told = self._identity() | self._news()
        if self._connect is None or not sys.executable:
            logger.warning("The heartbeat is a thread: what a connection needs cannot be passed to another process")
            beating = asyncio.to_thread(asyncio.run, self._beat_here())
        else:
            beating = self._beat_in_process()
        self._beating = asyncio.create_task(beating, name="coord heartbeat's process")
        return await super().__aenter__()

    async def __aexit__(self, *_: object) -> None:
        """Off the list, once nothing can put the worker back on it."""
        await super().__aexit__()
        assert self._beating is not None
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(_line({"end": True}))
            self._process.stdin.close()
        for force in (self._kill, self._beating.cancel):  # also a process that was killed is waited for
            await asyncio.wait([self._beating], timeout=PROCESS_END_SECONDS)
            force()
        await asyncio.wait([self._beating], timeout=PROCESS_END_SECONDS)
        await self._leave()

    async def _enrol(self) -> None:
        """Be on the list. Somebody else, started together with this worker, may only be making the tables."""
        own = {"id": self._state.id, "tasks": self._state.config.signatures, "jobs": {}}
        row = insert(workers).values(self._row | own)
        for attempt in count(1):
            began = time.monotonic()
            try:
                await self._state.execute(row)
            except ProgrammingError as error:
                if sqlstate_of(error) != UNDEFINED_TABLE:
                    raise
            else:
                self._state.board.beaten = began
                return
            if attempt == 1:
                logger.warning("The ledger's tables are missing; waiting for them: `coord schema --apply` makes them")
            await asyncio.sleep(backoff(attempt, TABLES_PAUSE_SECONDS))

    async def _leave(self) -> None:
        event.remove(self._engine.sync_engine, "do_connect", self._note_connect)
        try:
            async with asyncio.timeout(PROCESS_END_SECONDS):
                await self._state.execute(delete(workers).where(workers.c.id == self._state.id))
        except Exception as error:  # noqa: BLE001 - who looks after the queue finds out in some seconds
            logger.debug("This worker is still on the list: %s", error)

    def _note_connect(self, _dialect: Any, _record: Any, arguments: list[Any], parameters: dict[str, Any]) -> None:
        found = [[*arguments], dict(parameters)]
        self._connect = found if _is_plain(found) else None

    async def round(self) -> None:
        self._state.board.loop_tick = time.monotonic()
        news = self._news()
        if not news.items() <= self._told.items():
            self._told |= news
            if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
                self._process.stdin.write(_line(news))

    def _tick_in_thread(self) -> None:
        while not self._ending:
            self._state.board.thread_tick = time.monotonic()
            time.sleep(TICK_SECONDS)

    def _news(self) -> dict[str, Any]:
        jobs = [job for job in self._state.running if job.attempt.progress is not None]
        progress = {str(job.message.id): job.attempt.progress for job in jobs}
        news = {"progress": progress, "paused": self._state.is_paused}
        return news if self._connect is None else news | {"connect": self._connect}

    def _identity(self) -> dict[str, Any]:
        config, schema = self._state.config, known_schema(self._state.engine.dialect)
        return {
            "path": [entry for entry in sys.path if isinstance(entry, str)],
            "pid": os.getpid(),
            "slots": config.max_jobs,
            "table": _PREPARER.format_table(table(workers.name, schema=schema)),
            "tasks": [*config.tasks],
            "health_key": config.health_check_key,
            "redis": config.address.parameters(),
            "row": {**self._row, "id": str(self._state.id), "tasks": json.dumps(config.signatures)},
        }

    async def _beat_in_process(self) -> None:
        while not self._ending:
            try:
                await self._run_process()
            except Exception:
                logger.exception("The heartbeat's process has failed, and is started again")
                self._kill()
            if not self._ending:
                await asyncio.sleep(RESTART_SECONDS)

    async def _run_process(self) -> None:
        file = self._state.board.file
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            beat.__file__,
            str(file),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[file],
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(_line(self._told))
        async for line in self._process.stdout:
            _say(line.decode(errors="replace").strip())
        status = await self._process.wait()
        if not self._ending:
            logger.warning("The heartbeat's process has ended with status %d, and is started again", status)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _beat_here(self) -> None:
        """In an event loop of its own."""
        engine, redis = another(self._engine), redis_of(self._told["redis"])
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        try:
            await Beats(self._state.board, self._told, autocommit, redis, _say).run(lambda: self._ending)
        finally:
            await dispose(engine)
            await redis.aclose()


def _line(told: dict[str, Any]) -> bytes:
    return json.dumps(told).encode() + b"\n"


def _say(line: str) -> None:
    level, _, text = line.partition(" ")
    logger.log(logging.WARNING if level == "warning" else logging.DEBUG, "%s", text)


def _is_plain(found: Any) -> bool:
    """Whether another process can be told."""
    try:
        return bool(json.loads(json.dumps(found)) == found)
    except (TypeError, ValueError):
        return False
