"""`Prefer` (RFC 7240): what a client would like, read leniently, since a preference is never an error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PREFERENCE = re.compile(
    r"""\s*(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+)
        (?:\s*=\s*(?P<value>[!#$%&'*+.^_`|~0-9A-Za-z-]+|"(?:[^"\\]|\\.)*"))?
        (?:\s*;(?:[^,"]|"(?:[^"\\]|\\.)*")*)?\s*(?:,|$)""",
    re.VERBOSE,
)
LONGEST = 4_096
"""Characters of the header that are looked at."""
MOST_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Preference:
    """How long the answer may take, and what to do then."""

    wait: int | None = None
    """Seconds, as asked for."""
    respond_async: bool = False

    @classmethod
    def of(cls, headers: Iterable[str]) -> Preference:
        """What is unknown, malformed or said a second time does not count."""
        found = dict(reversed([*_preferences(", ".join(headers)[:LONGEST])]))
        wait = found.get("wait") or ""
        seconds = int(wait) if wait.isascii() and wait.isdecimal() and len(wait) <= MOST_DIGITS else None
        return cls(seconds, "respond-async" in found)

    def seconds(self, cap: float) -> float:
        """How long to wait at most: what was asked for, within the cap; at once to who would rather not wait."""
        if self.wait is None:
            return 0.0 if self.respond_async else cap
        return min(float(self.wait), cap)

    def applied(self, cap: float, *, accepted: bool) -> str | None:
        """For `Preference-Applied`: what has made a difference."""
        parts = [] if self.wait is None else [f"wait={self.seconds(cap):g}"]
        if self.respond_async and accepted:
            parts.append("respond-async")
        return ", ".join(parts) or None


def _preferences(text: str) -> Iterator[tuple[str, str | None]]:
    position = 0
    while position < len(text):
        match = _PREFERENCE.match(text, position)
        if match is None:  # garbage up to the next comma
            position = text.find(",", position) + 1 or len(text)
            continue
        value = match["value"]
        if value is not None and value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        yield match["name"].lower(), value
        position = match.end()
