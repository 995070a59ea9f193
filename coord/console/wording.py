"""How figures and times are written: the same everywhere on the pages."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coord.fleet import Number


def count(number: Number | int) -> str:
    """`1,204`; of an estimate "about 810,000", with three figures that mean something."""
    if isinstance(number, int):
        return f"{number:,}"
    if number.exact:
        return f"{number.value:,}"
    digits = max(0, len(str(number.value)) - 3)
    return f"about {round(number.value, -digits):,}"


def span(seconds: float | None) -> str:
    """`0.3 ms`, `412 ms`, `2.4 s`, `3 min 10 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None:
        return "–"
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, of, size, rest in (("min", "s", 60, 1), ("h", "min", 3_600, 60), ("d", "h", 86_400, 3_600)):
        if whole < size * {"min": 60, "h": 24, "d": 10**9}[unit]:
            large, small = divmod(whole, size)
            return f"{large} {unit} {small // rest} {of}" if small // rest else f"{large} {unit}"
    return f"{whole} s"


def moment(at: datetime | None) -> str:
    """`2026-11-30 00:50:12` in UTC."""
    return "–" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def instant(at: datetime | None) -> str:
    """The same to a millisecond, of a day that is known."""
    return "–" if at is None else f"{at.astimezone(UTC):%H:%M:%S}.{at.microsecond // 1000:03d}"


def day(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d}"


def clock(at: datetime | None) -> str:
    return "–" if at is None else f"{at.astimezone(UTC):%H:%M:%S}"


def short(id_: object) -> str:
    """The end of an id: those of one moment begin alike."""
    return f"…{str(id_)[-12:]}"
