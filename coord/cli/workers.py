"""`coord workers`: who lives, what it runs, what it knows."""

from __future__ import annotations

import click
from sqlalchemy import func, select

from coord.cli.output import show
from coord.cli.servers import asynchronous, json_option, session_of, url_option
from coord.jobs.model import execute, queues, workers


@click.command()
@url_option
@json_option
@asynchronous
async def command(url: str | None, as_json: bool) -> None:
    """The workers that have a heartbeat, the oldest first."""
    since = func.extract("epoch", func.clock_timestamp() - workers.c.beat_at).label("heartbeat")
    leads = (queues.c.leader == workers.c.id).label("leads")
    both = workers.outerjoin(queues, queues.c.name == workers.c.queue)
    statement = select(workers, since, leads).select_from(both).order_by(workers.c.started_at)
    async with session_of(url) as session:
        rows = (await session.run_sync(execute, statement)).all()
    found = [
        {
            "id": row.id,
            "queue": row.queue,
            "where": f"{row.host}:{row.pid}",
            "since": row.started_at,
            "heartbeat": float(row.heartbeat),
            "state": "dead" if row.dead else "stopping" if row.stopping else "leads" if row.leads else "works",
            "runs": len(row.jobs),
            "jobs": row.jobs,
            "tasks": row.tasks,
            "knows": ", ".join(sorted(row.tasks)),
        }
        for row in rows
    ]
    columns = ("where", "queue", "state", "since", "heartbeat", "runs", "knows", "id")
    show(found, columns, as_json=as_json, empty="no worker has a heartbeat")
