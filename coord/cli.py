"""The `coord` command: a table of its subcommands."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NamedTuple

from coord.dev import command as dev
from coord.jobs import migrations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Command(NamedTuple):
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "dev": Command("run an API, its workers, PostgreSQL and Valkey together", dev.configure, dev.run),
    "schema": Command("print or apply the DDL of the ledger's tables", migrations.configure, migrations.run),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status; 2 is argparse's, for a command line it does not understand."""
    parser = argparse.ArgumentParser(prog="coord")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, description=command.summary)
        command.configure(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
