"""Something that may be away, or refuse: said once when it does, and once when all is well again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from redis.exceptions import ResponseError

if TYPE_CHECKING:
    import logging

REFUSAL_SECONDS = 10.0
"""How long a refusal lasts at least, as others of the same kind may be allowed: it is not said again meanwhile."""


class _Failure(NamedTuple):
    error: BaseException
    at: float
    """On the system's monotonic clock."""

    @property
    def is_refusal(self) -> bool:
        """Whether a server that is there has answered it: MISCONF, NOPERM, READONLY and the like."""
        return isinstance(self.error, ResponseError)


class Outage:
    """Told of every success and failure, by whom it befell, and logs what is news.

    All is well when all who failed have succeeded since. With `everybody` a success ends the failures of others too,
    but for what they were refused.
    """

    def __init__(self, logger: logging.Logger, *, away: str, back: str) -> None:
        self._logger = logger
        self._away = away
        self._back = back
        self._failures: dict[str, _Failure] = {}

    @property
    def lasts(self) -> bool:
        return bool(self._failures)

    def report(self, error: BaseException | None, of: str = "", *, everybody: bool = False) -> None:
        """A failure, or with None a success."""
        now = time.monotonic()
        if error is not None:
            self._log_new(_Failure(error, now))
            self._failures[of] = _Failure(error, now)
        elif self._failures:
            over = [*self._failures] if everybody else [of]
            self._failures = {
                source: failure
                for source, failure in self._failures.items()
                if source not in over or (failure.is_refusal and (source != of or now - failure.at < REFUSAL_SECONDS))
            }
            if not self._failures:
                self._logger.warning("%s", self._back)

    def _log_new(self, failure: _Failure) -> None:
        """A refusal is news also while the server was away, once for each kind."""
        if not self._failures:
            self._logger.warning("%s: %s", self._away, failure.error or type(failure.error).__name__)
        elif failure.is_refusal and _kind(failure) not in map(_kind, self._failures.values()):
            self._logger.warning("It refuses: %s", failure.error)


def _kind(failure: _Failure) -> str:
    """The error's code, which begins a server's answer, as far as redis-py has left it."""
    return f"{type(failure.error).__name__} {str(failure.error).partition(' ')[0]}" if failure.is_refusal else ""
