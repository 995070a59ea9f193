"""`coord queues`: what waits in them, and whether they are paused."""

from __future__ import annotations

from typing import Any

import click
from sqlalchemy import func, select, union

from coord.cli.output import show
from coord.cli.servers import asynchronous, json_option, session_of, url_option
from coord.jobs.model import execute, is_queued, jobs, queues, workers
from coord.jobs.pauses import pause_queue, resume_queue


@click.group()
def command() -> None:
    """List queues, pause and resume them."""


@command.command("list")
@url_option
@json_option
@asynchronous
async def list_(url: str | None, as_json: bool) -> None:
    """What waits in each queue: due, for later, and for how long the oldest is due."""
    now = func.clock_timestamp()
    due = jobs.c.scheduled_at <= now
    waiting = select(
        jobs.c.queue.label("name"),
        func.count().filter(due).label("due"),
        func.count().filter(~due).label("later"),
        func.extract("epoch", now - func.min(jobs.c.scheduled_at).filter(due)).label("oldest"),
    )
    async with session_of(url) as session:
        counted = (await session.run_sync(execute, waiting.where(is_queued).group_by(jobs.c.queue))).mappings().all()
        names = union(select(queues.c.name), select(workers.c.queue))
        known = (await session.run_sync(execute, names)).scalars().all()
        paused = {row.name: row.paused_at for row in await session.run_sync(execute, select(queues))}
    counts: dict[str, Any] = {row["name"]: row for row in counted}
    found = [
        {
            "queue": name,
            "due": counts[name]["due"] if name in counts else 0,
            "later": counts[name]["later"] if name in counts else 0,
            "oldest": float(counts[name]["oldest"]) if name in counts and counts[name]["oldest"] is not None else None,
            "paused since": paused.get(name),
        }
        for name in sorted({*known, *counts})
    ]
    columns = ("queue", "due", "later", "oldest", "paused since")
    show(found, columns, as_json=as_json, empty="there is no queue yet")


@command.command()
@click.argument("queue")
@url_option
@asynchronous
async def pause(queue: str, url: str | None) -> None:
    """Have workers take nothing more of the queue; what runs goes on to its end."""
    async with session_of(url) as session:
        await pause_queue(session, queue)
        await session.commit()
    click.echo(f"{queue} is paused")


@command.command()
@click.argument("queue")
@url_option
@asynchronous
async def resume(queue: str, url: str | None) -> None:
    """Have workers take jobs of the queue again."""
    async with session_of(url) as session:
        await resume_queue(session, queue)
        await session.commit()
    click.echo(f"{queue} is resumed")
