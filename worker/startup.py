"""How little a process says when it cannot start."""

from __future__ import annotations

import logging


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


def held_log(*loggers: str) -> HeldLog:
    held = HeldLog()
    for name in loggers:
        logging.getLogger(name).addFilter(held)
    return held
