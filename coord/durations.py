"""Numbers as the library takes them: durations in seconds, as a number or a `timedelta`, and whole numbers."""

from __future__ import annotations

import math
import re
from datetime import timedelta

Seconds = float | timedelta

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|min|h|d)\s*")
MAX_SECONDS = 2_147_483_647 / 1000
"""Seconds; PostgreSQL keeps its timeouts as a signed 32-bit number of milliseconds."""


def seconds(name: str, value: object) -> float:
    """`value` as non-negative, finite seconds; `ValueError` or `TypeError` naming the argument otherwise."""
    if isinstance(value, timedelta):
        number = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) < 1e300 else math.inf
    else:
        raise TypeError(f"{name} is seconds or a timedelta, not {value!r}")
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} is a finite number of seconds, 0 or more, not {value!r}")
    return number


def positive(name: str, value: object) -> float:
    number = seconds(name, value)
    if number == 0:
        raise ValueError(f"{name} is more than 0 seconds")
    return number


def whole(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is a whole number, {limits}, not {value!r}")
    return value


def postgres_timeout(name: str, value: object) -> float:
    """`seconds`, also spelled the way PostgreSQL writes a time with its unit: `"500ms"`, `"5s"`."""
    if isinstance(value, str):
        match = _TEXT.fullmatch(value)
        if match is None:
            raise ValueError(f"{name} is seconds or a time with its unit such as '500ms' or '5s', not {value!r}")
        value = float(match[1]) * _UNITS[match[2]]
    number = seconds(name, value)
    if number > MAX_SECONDS:
        raise ValueError(f"{name} is at most {MAX_SECONDS:.0f} seconds, not {value!r}")
    return number
