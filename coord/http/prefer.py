"""`Prefer` (RFC 7240): what a client would like, read leniently, since a preference is never an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_STRING = r'"(?:[^"\\]|\\.)*+'  # and its end, which may be missing
# Possessive, so that no header takes more than linear time.
_PARTS = re.compile(rf'(?:[^",]|{_STRING}"?+)++', re.DOTALL)
_PREFERENCE = re.compile(
    rf'\s*+(?P<name>{_TOKEN})(?:\s*+=\s*+(?P<value>{_TOKEN}|{_STRING}")?+)?+\s*+(?:;|\Z)', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Preference:
    """How long the answer may take, and what to do then."""

    wait: float | None = None
    """Whole seconds, as sent, or infinity for a number too long to be one."""
    respond_async: bool = False

    @classmethod
    def of(cls, headers: Iterable[str]) -> Preference:
        """What is unknown, malformed or repeated does not count."""
        found = dict(reversed([preference for header in headers for preference in _preferences(header)]))
        wait = found.get("wait") or ""
        return cls(float(wait) if wait.isascii() and wait.isdecimal() else None, "respond-async" in found)

    def seconds(self, cap: float) -> float:
        """How long to wait at most: what was sent, within the cap; 0 for `respond-async`."""
        if self.wait is None:
            return 0.0 if self.respond_async else cap
        return min(self.wait, cap)

    def applied(self, cap: float, *, waited: bool, accepted: bool) -> str | None:
        """For `Preference-Applied`: what has made a difference."""
        parts = [f"wait={int(self.seconds(cap))}"] if waited and self.wait is not None else []
        if accepted and self.respond_async:
            parts.append("respond-async")
        return ", ".join(parts) or None


def _preferences(header: str) -> Iterator[tuple[str, str | None]]:
    for part in _PARTS.findall(header):
        if (match := _PREFERENCE.match(part)) is not None:
            value = match["value"]
            if value is not None and value.startswith('"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
            yield match["name"].lower(), value
