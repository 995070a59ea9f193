"""Something that may be away, or refuse: said once when it does, and once when all is well again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

if TYPE_CHECKING:
    import logging


class Outage:
    """Told of every success and failure, by whom it befell, and logs what is news.

    All is well when all who failed have succeeded since. With `everybody` a success ends the failures of others too,
    but for what they were refused by a server that is there: MISCONF, NOPERM, READONLY and the like.
    """

    def __init__(self, logger: logging.Logger, *, away: str, back: str) -> None:
        self._logger = logger
        self._away = away
        self._back = back
        self._failures: dict[str, BaseException] = {}

    def report(self, error: BaseException | None, of: str = "", *, everybody: bool = False) -> None:
        """A failure, or with None a success."""
        if error is not None:
            self._log_new(error)
            self._failures[of] = error
        elif self._failures:
            self._failures = {
                source: failure
                for source, failure in self._failures.items()
                if source != of and (_refusal(failure) or not everybody)
            }
            if not self._failures:
                self._logger.warning("%s", self._back)

    def _log_new(self, error: BaseException) -> None:
        """A refusal is news also while the server was away, once for each kind."""
        if not self._failures:
            self._logger.warning("%s: %s", self._away, error or type(error).__name__)
        elif _refusal(error) and _refusal(error) not in map(_refusal, self._failures.values()):
            self._logger.warning("It refuses: %s", error)


def _refusal(error: BaseException) -> tuple[type, str] | None:
    """Its kind: the class, and the code that begins a server's answer, as far as redis-py has left it there."""
    return (type(error), str(error).partition(" ")[0]) if isinstance(error, ResponseError) else None
