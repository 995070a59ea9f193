"""How little a process says when it cannot start."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def is_run_by(command: str) -> bool:
    """Whether this process is that command's, and not somebody's who imports the shop."""
    return command in Path(sys.argv[0]).parts[-2:]


class HeldLog(logging.Filter):
    """Holds back what others say of a start until it has succeeded: of one that failed, one line says enough."""

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


def held_log(command: str, *loggers: str) -> HeldLog:
    """Where the command runs this: of nobody else is it known that he starts anything, and releases what is held."""
    held = HeldLog()
    for name in loggers if is_run_by(command) else ():
        logging.getLogger(name).addFilter(held)
    return held
