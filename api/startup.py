"""What is open while the application serves, and how little it says when it cannot start."""

from __future__ import annotations

import logging
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from api.health import probe
from api.queue import redis
from coord import Coordinator
from worker.database import close_database, open_database, session_maker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI


class StartupLog(logging.Filter):
    """Holds back what uvicorn says of a start until it has succeeded: of one that failed, one line says enough."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[logging.LogRecord] | None = []

    def filter(self, record: logging.LogRecord) -> bool:
        if self._held is None:
            return True
        self._held.append(record)
        return False

    def release(self) -> None:
        held, self._held = self._held or [], None
        for record in held:
            logging.getLogger(record.name).handle(record)


_log = StartupLog()
logging.getLogger("uvicorn.error").addFilter(_log)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    try:
        await open_database()
    except SystemExit as refusal:  # uvicorn makes its own exit of it, status 3, and would log a traceback
        print(refusal, file=sys.stderr)
        raise
    _log.release()
    try:
        async with Coordinator(session_maker, redis=redis):
            yield
    finally:
        await redis.aclose()
        await probe.dispose()
        await close_database()
