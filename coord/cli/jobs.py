"""`coord jobs`: list, show, retry, cancel, prune."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import click
from sqlalchemy import Delete, delete, func, literal, select

from coord.cli.output import say_json, show
from coord.cli.servers import asynchronous, json_option, session_of, url_option
from coord.jobs.model import JobState, attempts, execute, jobs
from coord.jobs.options import MAX_SPAN_SECONDS
from coord.jobs.queries import cancel_job, free_of, get_job, list_attempts, list_jobs, retry_job

FINAL = [str(state) for state in JobState if state.is_final]
PRUNED_ROWS = 5_000
"""In one statement."""
MAX_DAYS = MAX_SPAN_SECONDS / 86_400
ids = click.argument("ids", type=UUID, nargs=-1, required=True, metavar="ID...")


@click.group()
def command() -> None:
    """List, show, retry, cancel and prune jobs."""


@command.command("list")
@click.option("--state", type=click.Choice([str(state) for state in JobState]), help="those in this state alone")
@click.option("--task", help="those of this task alone")
@click.option("--before", type=UUID, metavar="ID", help="older ones than this one: the next page")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@url_option
@json_option
@asynchronous
async def list_(url: str | None, as_json: bool, **filters: Any) -> None:
    """List jobs, the newest first."""
    async with session_of(url) as session:
        found = [dataclasses.asdict(report) for report in await list_jobs(session, **filters)]
    columns = ("id", "task", "state", "attempt", "queue", "created_at", "finished_at", "error")
    for job in () if as_json else found:
        if job["state"] == JobState.DONE:
            job["error"] = None  # of an attempt before the one that succeeded; `coord jobs show` has it
    show(found, columns, as_json=as_json, empty="no such job")


@command.command("show")
@click.argument("job_id", type=UUID, metavar="ID")
@url_option
@json_option
@asynchronous
async def show_(job_id: UUID, url: str | None, as_json: bool) -> None:
    """Show all that the ledger has of one job: its arguments and traceback too."""
    async with session_of(url) as session:
        report = dataclasses.asdict(await get_job(session, job_id))
        tried = [dataclasses.asdict(each) for each in await list_attempts(session, job_id)]
    if as_json:
        say_json({**report, "attempts": tried})
        return
    for name, value in report.items():
        if value is not None and name != "traceback":
            click.echo(f"{name:14} {value}")
    columns = ("number", "outcome", "began", "ended", "host", "pid", "error")
    show(tried, columns, as_json=False, empty="no attempt has failed")
    if report["traceback"]:
        click.echo(report["traceback"].rstrip())


@command.command()
@ids
@url_option
@asynchronous
async def retry(ids: tuple[UUID, ...], url: str | None) -> None:
    """Run failed or cancelled jobs again; all of them, or none. They begin within five seconds."""
    async with session_of(url) as session:
        for job_id in ids:
            await retry_job(session, job_id)
    click.echo(f"{len(ids)} to run again")


@command.command()
@ids
@url_option
@asynchronous
async def cancel(ids: tuple[UUID, ...], url: str | None) -> int:
    """Cancel jobs: one that is queued never runs, one that runs is stopped. Exit status 1 if one was done or failed."""
    states = {}
    async with session_of(url) as session:
        for job_id in ids:
            states[job_id] = await cancel_job(session, job_id)
    for job_id, state in states.items():
        said = {JobState.CANCELLED: "cancelled", JobState.RUNNING: "runs; its worker is told"}
        click.echo(f"{job_id} {said.get(state, f'is {state}: too late')}")
    return int(any(state in (JobState.DONE, JobState.FAILED) for state in states.values()))


def _days(_context: object, _option: object, given: float) -> float:
    if not 0 <= given <= MAX_DAYS:
        raise click.BadParameter(f"{given:g} is not a number of days from 0 to {MAX_DAYS:g}.")
    return given


@command.command()
@click.option("--older-than", type=float, callback=_days, required=True, metavar="DAYS", help="since they ended")
@click.option(
    "--state", type=click.Choice(FINAL), multiple=True, help="those in this state; all that ended unless given"
)
@click.option("--yes", is_flag=True, help="do not ask")
@url_option
@asynchronous
async def prune(older_than: float, state: tuple[str, ...], yes: bool, url: str | None) -> None:
    """Delete jobs that have ended, and their attempts."""
    states = state or FINAL
    if not yes:
        click.confirm(
            f"Delete the {' and '.join(states)} jobs that ended more than {older_than:g} days ago?", abort=True
        )
    gone, deleted = PRUNED_ROWS, 0
    while gone >= PRUNED_ROWS:
        async with session_of(url) as session:
            gone = (await session.run_sync(execute, _ended(states, older_than))).rowcount
        deleted += gone
    click.echo(f"{deleted} deleted")


def _ended(states: Sequence[str], days: float) -> Delete:
    before = func.now() - literal(timedelta(days=days))
    old = select(jobs.c.id).where(jobs.c.state.in_(states), jobs.c.finished_at < before)
    page = free_of(old.limit(PRUNED_ROWS))
    history = delete(attempts).where(attempts.c.job_id.in_(page)).cte("history")
    return delete(jobs).where(jobs.c.id.in_(page)).add_cte(history)
