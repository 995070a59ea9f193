"""`read_settings`: what the rows that a session reads depend on, declared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

Settings = tuple[tuple[str, str], ...]
"""PostgreSQL's settings and their values, by name."""
Declared = Mapping[str, str] | Callable[["AsyncSession"], Mapping[str, str]] | None

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")


def check_declared(declared: object) -> None:
    """`ValueError` unless it is a mapping of settings, something that makes one of a session, or None."""
    if declared is not None and not callable(declared):
        _settings(declared)


def settings_of(declared: Declared, session: AsyncSession) -> Settings | None:
    """Those under which a shared read sees what this session sees; None if undeclared."""
    if declared is None:
        return None
    return _settings(declared(session) if callable(declared) else declared)


def _settings(declared: object) -> Settings:
    if not isinstance(declared, Mapping):
        raise ValueError(  # noqa: TRY004 - it is an argument's value, or what an argument has returned
            f"read_settings is a mapping of PostgreSQL's settings to text, or gives one for a session; not {declared!r}"
        )
    for name, value in declared.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"read_settings has {name!r}, which is not the name of a setting of PostgreSQL")
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"read_settings[{name!r}] is text without a null character, not {value!r}")
    return tuple(sorted(declared.items()))
