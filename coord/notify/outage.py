"""A server that may be away, or refuse commands: logged once when that begins, and once when it is over."""

from __future__ import annotations

import logging

from redis.exceptions import ResponseError

from coord.errors import message_of


class Outage:
    """Given every success and failure, by its source, and logs the first failure and the end of the last.

    It is over when every source that failed has succeeded since. With `everybody` a success ends the failures of other
    sources too, except what a server that is there has refused them: MISCONF, NOPERM, READONLY and the like.
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
        """A refusal is logged also during an outage, once for each kind."""
        if not self._failures:
            self._logger.warning("%s: %s", self._away, message_of(error))
        elif _refusal(error) and _refusal(error) not in map(_refusal, self._failures.values()):
            self._logger.warning("It refuses: %s", error)


def _refusal(error: BaseException) -> tuple[type, str] | None:
    """Its kind: the class, and the code that begins a server's answer, as far as redis-py has left it there."""
    return (type(error), str(error).partition(" ")[0]) if isinstance(error, ResponseError) else None
