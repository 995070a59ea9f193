"""Jobs in aligned columns, for the message of an assertion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coord.jobs.arguments import to_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Shown = Mapping[str, str]
    """What is shown of a job, by column."""

COLUMNS = ("task", "arguments", "queue", "priority", "unique_key", "one_at_a_time", "max_attempts", "timeout", "due")
MAX_ROWS, MAX_CHARACTERS = 20, 50
"""Rows, and characters of a cell, that are shown."""


def table(rows: Sequence[Shown]) -> str:
    """A line of names and a line a row, without the columns that none has anything in."""
    names = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    cells = [names, *([_cut(row.get(name, "")) for name in names] for row in rows[:MAX_ROWS])]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["    " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    if len(rows) > MAX_ROWS:
        lines.append(f"    … and {len(rows) - MAX_ROWS} more")
    return "\n".join(lines)


def shown(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Arguments as they are passed, each as JSON."""
    named = (f"{name}={to_json(value)}" for name, value in kwargs.items())
    return ", ".join([*map(to_json, args), *named])


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 1]}…"
