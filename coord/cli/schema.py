"""`coord schema`: the ledger's tables, printed or applied."""

from __future__ import annotations

import click

from coord.cli.output import say_json
from coord.cli.servers import asynchronous, json_option, session_of, url_option
from coord.database.place import ledger_schema
from coord.jobs.migrations import create_ledger, ddl, latest


@click.command()
@click.option("--apply", is_flag=True, help="make or upgrade the tables instead of printing them")
@click.option("--schema", help="where the tables are; the default schema unless given or made elsewhere")
@url_option
@json_option
@asynchronous
async def command(apply: bool, schema: str | None, url: str | None, as_json: bool) -> None:
    """Print the DDL of the ledger's tables, or make and upgrade them."""
    place: str | None = None
    if apply:
        async with session_of(url) as session:
            connection = await session.connection()
            await create_ledger(connection, schema=schema)
            place = schema or await connection.run_sync(ledger_schema) or connection.dialect.default_schema_name
    if as_json:
        say_json({"version": latest(), "applied": apply, "ddl": ddl(schema)})
    elif apply:
        click.echo(f"the ledger is of version {latest()}, in schema {place}")
    else:
        click.echo(ddl(schema))
