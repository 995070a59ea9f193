"""Something that may be away: said once when it is, and once when it is back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


class Outage:
    """Told of every success and failure, says what is news."""

    def __init__(self, logger: logging.Logger, *, away: str, back: str) -> None:
        self._logger = logger
        self._away = away
        self._back = back
        self.lasts = False

    def report(self, error: BaseException | None) -> None:
        """A failure, or with None a success."""
        if error is not None and not self.lasts:
            self._logger.warning("%s: %s", self._away, error or type(error).__name__)
        elif error is None and self.lasts:
            self._logger.warning("%s", self._back)
        self.lasts = error is not None
