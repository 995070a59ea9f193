"""The `coord` command.

    coord jobs | queues | workers | locks    what is there, and what can be done about it
    coord doctor                             what is wrong with a set-up, and what to do
    coord schema | dev                       the ledger's tables; everything in one terminal

Exit status: 0, or 1 if it could not be done or something was found, or 2 for a command line that makes no sense.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "jobs": "list, show, retry, cancel and prune jobs",
    "queues": "list queues, pause and resume them",
    "workers": "the workers, what they run and what they know",
    "locks": "who holds which table, and who waits behind whom",
    "doctor": "what is wrong with a set-up, and what to do about it",
    "schema": "print or apply the DDL of the ledger's tables",
    "dev": "run an API, its workers, PostgreSQL and Valkey together",
}


class _Commands(click.Group):
    """Imports what a command needs when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"coord.cli.{name}").command
        return found


@click.group(cls=_Commands)
@click.version_option(importlib.metadata.version("coord"), prog_name="coord")
def commands() -> None:
    """See coord's jobs, queues, workers and locks, act on them, check a set-up, and run one for development."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one; return the exit status. Whatever goes wrong is one line on stderr."""
    try:
        status: Any = commands.main(args=arguments, prog_name="coord", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        print(f"coord: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 1
    except click.Abort:
        return 130
    return status if isinstance(status, int) else 0
