"""What is kept of an error: one line, and a traceback that PostgreSQL can store."""

from __future__ import annotations

import random
import traceback

MAX_LINE, MAX_TRACEBACK = 500, 20_000
"""Characters."""
PAUSE_SECONDS = (0.1, 30.0)
"""Before the second attempt, and before any later one at most."""


class AttemptTimeoutError(Exception):
    """The attempt took longer than it may."""


def backoff(attempt: int, pauses: tuple[float, float] = PAUSE_SECONDS) -> float:
    """Seconds, doubling, with a jitter that keeps what failed together from failing together again."""
    first, most = pauses
    return float(min(first * 2 ** min(attempt - 1, 30), most) * random.uniform(0.5, 1.0))


def one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - whatever it is, the error itself must not be lost for it
        text = "cannot say what it is"
    return storable(f"{type(error).__name__}: {text}"[:MAX_LINE] if text else type(error).__name__)


def full_text(error: BaseException) -> str:
    return storable("".join(traceback.format_exception(error))[-MAX_TRACEBACK:])


def printable(error: BaseException) -> BaseException | None:
    """For a log: None of an error whose text no stream could be given, half a surrogate pair say."""
    told = "".join(traceback.format_exception(error))
    return error if told == storable(told) else None


def storable(text: str) -> str:
    """Without what PostgreSQL's text cannot hold: a null character, half a surrogate pair."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def escaped(text: str) -> str:
    """For a database whose encoding lacks the character."""
    return text.encode("ascii", "backslashreplace").decode()
