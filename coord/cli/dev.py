"""`coord dev`: an API, its workers and their servers in one terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coord.cli.servers import dotted


@click.command()
@click.option("--app", metavar="module:name", help="the ASGI application, as for uvicorn")
@click.option("--worker", metavar="module.Class", callback=dotted, help="the worker settings, as for arq")
@click.option("--workers", type=click.IntRange(0), default=1, metavar="N", help="worker processes, 1 unless given")
@click.option("--host", default="127.0.0.1", help="where the API listens, 127.0.0.1 unless given")
@click.option("--port", type=int, default=8000, help="8000 unless given; 0 picks a free one")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path(".coord"),
    help="the servers' directory, .coord unless given",
)
@click.option(
    "--reload", is_flag=True, help="start the programs again when a Python file beneath this directory changes"
)
@click.option("--servers-only", is_flag=True, help="PostgreSQL and Valkey alone")
def command(servers_only: bool, **options: Any) -> int:
    """Run an API, its workers, PostgreSQL and Valkey together."""
    from coord.dev.command import Options, run

    if not servers_only and not (options["app"] and options["worker"]):
        raise click.UsageError("name the programs with --app and --worker, or take --servers-only")
    if servers_only:
        options |= {"app": None, "worker": None}
    return run(Options(**options))
