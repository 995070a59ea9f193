"""What a command says: JSON for programs, tables for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PIPE_CHARACTERS = 10_000
"""In a line for another program, which folds nothing."""


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """As a JSON array with all that there is, or as a table with these columns."""
    if as_json:
        say_json(rows)
    elif not rows:
        click.echo(empty)
    else:
        _table(rows, columns)


def say_json(value: Any) -> None:
    click.echo(json.dumps(value, default=_plain, indent=2))


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise click.ClickException('tables need rich: pip install "coord[cli]"; --json does without') from None
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    width = None if sys.stdout.isatty() else PIPE_CHARACTERS
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case datetime():
            return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
        case float():
            return f"{value:.1f} s"
        case dict() | list():
            return json.dumps(value, default=_plain)
    return " ".join(str(value).split())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.isoformat() if isinstance(value, datetime) else str(value)
