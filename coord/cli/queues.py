"""`coord queues`: what waits in them, and whether they are paused."""

from __future__ import annotations

import click

from coord.cli.output import show
from coord.cli.servers import asynchronous, json_option, session_of, url_option
from coord.fleet import living_workers, queue_depths
from coord.jobs.pauses import pause_queue, resume_queue


@click.group()
def command() -> None:
    """List queues, pause and resume them."""


@command.command("list")
@url_option
@json_option
@asynchronous
async def list_(url: str | None, as_json: bool) -> None:
    """List queues: what is due, what is for later, how long the oldest job is due, and how many workers there are."""
    async with session_of(url) as session:
        depths = await queue_depths(session, await living_workers(session))
    found = [
        {
            "queue": depth.name,
            "due": depth.due.value,
            "later": depth.later.value,
            "oldest": depth.oldest,
            "workers": depth.workers,
            "paused since": depth.paused_at,
        }
        for depth in depths
    ]
    columns = ("queue", "due", "later", "oldest", "workers", "paused since")
    show(found, columns, as_json=as_json, empty="there is no queue yet")


@command.command()
@click.argument("queue")
@url_option
@asynchronous
async def pause(queue: str, url: str | None) -> None:
    """Pause a queue: within two seconds workers take nothing more of it; what runs goes on to its end."""
    async with session_of(url) as session:
        await pause_queue(session, queue)
    click.echo(f"{queue} is paused")


@command.command()
@click.argument("queue")
@url_option
@asynchronous
async def resume(queue: str, url: str | None) -> None:
    """Resume a queue: within two seconds workers take its jobs again."""
    async with session_of(url) as session:
        await resume_queue(session, queue)
    click.echo(f"{queue} is resumed")
