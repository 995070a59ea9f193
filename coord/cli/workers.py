"""`coord workers`: who lives, what it runs, what it knows."""

from __future__ import annotations

import click

from coord.cli.output import show
from coord.cli.servers import asynchronous, json_option, session_of, url_option
from coord.fleet import living_workers


@click.command()
@url_option
@json_option
@asynchronous
async def command(url: str | None, as_json: bool) -> None:
    """List the workers that have a heartbeat, the oldest first."""
    async with session_of(url) as session:
        living = await living_workers(session)
    found = [
        {
            "id": each.id,
            "queue": each.queue,
            "where": f"{each.host}:{each.pid}",
            "since": each.started_at,
            "heartbeat": each.heartbeat,
            "state": each.state,
            "runs": len(each.runs),
            "jobs": each.runs,
            "tasks": each.tasks,
            "knows": ", ".join(each.tasks),
        }
        for each in living
    ]
    columns = ("where", "queue", "state", "since", "heartbeat", "runs", "knows", "id")
    show(found, columns, as_json=as_json, empty="no worker has a heartbeat")
