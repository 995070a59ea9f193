"""`coord locks`: the tree of who holds a lock and who waits behind whom."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from coord.blocking import blocking, tree
from coord.cli.output import say_json
from coord.cli.servers import asynchronous, json_option, session_of, url_option

if TYPE_CHECKING:
    from coord.blocking import Backend


@click.command()
@url_option
@json_option
@asynchronous
async def command(url: str | None, as_json: bool) -> None:
    """Show who holds which table, and who waits behind whom, each with its job and request."""
    async with session_of(url) as session:
        found = await blocking(session)
    if as_json:
        say_json([{**dataclasses.asdict(backend), "depth": depth} for depth, backend in tree(found)])
        return
    for depth, backend in tree(found):
        click.echo("   " * depth + ("└─ " if depth else "") + line(backend))
    if not found:
        click.echo("nobody holds a strong lock on a table, and nobody waits for any")


def line(backend: Backend) -> str:
    """In words, that are read aloud as they are."""
    job = backend.job
    who = f"pid {backend.pid}"
    if job is not None:
        request = f", request {job.request_id}" if job.request_id else ""
        who = (
            f"job {job.id} {job.task}, attempt {job.attempt} (pid {backend.pid}, worker {job.host}:{job.pid}{request})"
        )
    elif backend.application_name:
        who += f" ({backend.application_name})"
    said = []
    if backend.waits_for is not None:
        seconds = f"{backend.waiting_seconds:.1f} s" if backend.waiting_seconds is not None else "an instant"
        behind = " and ".join(str(pid) for pid in backend.blocked_by)
        said.append(f"waits {seconds} for {backend.waits_for}" + (f" behind pid {behind}" if behind else ""))
    if backend.holds:
        held = ", ".join(str(lock) for lock in backend.holds if lock.is_strong) or ", ".join(map(str, backend.holds))
        age = (
            "" if backend.transaction_seconds is None else f", in a transaction of {backend.transaction_seconds:.1f} s"
        )
        said.append(f"holds {held}{age}")
    state = f" [{backend.state}]" if backend.state else ""
    return f"{who} {'; '.join(said) or 'is in the way'}{state}"
