"""`coord doctor`: looks at a set-up from outside, changes nothing, and says of what it finds what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from coord.cli.checks import fleet, ledger, postgresql, redis, tasks
from coord.cli.checks.finding import Finding, Setup
from coord.cli.output import say_json
from coord.cli.servers import CONNECT_SECONDS, asynchronous, checked, dotted, json_option, masked, reason, url_option
from coord.database.engine import engine_of
from coord.database.place import ledger_schema
from coord.notify.sentinel import redis_from_url
from coord.queue.keys import NAMESPACE
from coord.worker.failure import one_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from redis.asyncio import Redis
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.config import WorkerConfig

CHECKS: tuple[Callable[[Setup], AsyncIterator[Finding]], ...] = (
    postgresql.server,
    ledger.tables,
    redis.server,
    redis.rights,
    fleet.clocks,
)
WITH_LEDGER: tuple[Callable[[Setup], AsyncIterator[Finding]], ...] = (fleet.known, tasks.put_off, fleet.handed_over)
"""Those that read its tables."""


@click.command()
@url_option
@click.option("--redis", envvar="COORD_REDIS_URL", metavar="URL", help="Redis, COORD_REDIS_URL unless given")
@click.option(
    "--worker", metavar="module.Class", callback=dotted, help="the worker settings, for its pool and its engine"
)
@click.option(
    "--namespace", default=NAMESPACE, show_default=True, help="that of the Coordinators; with --worker it is known"
)
@json_option
@asynchronous
async def command(url: str | None, redis: str | None, worker: str | None, namespace: str, as_json: bool) -> int:
    """Find what is wrong with a set-up. Exit status 1 if there is something."""
    found = [finding async for finding in findings(url, redis, worker, namespace)]
    if as_json:
        say_json([dataclasses.asdict(finding) for finding in found])
    for finding in () if as_json else found:
        click.echo(f"{finding.check}: {finding.what}\n    {finding.do}")
    if not found and not as_json:
        click.echo("nothing found")
    return int(bool(found))


async def findings(url: str | None, redis: str | None, worker: str | None, namespace: str) -> AsyncIterator[Finding]:
    try:
        address = checked(url)
    except click.ClickException as error:
        yield Finding("url", error.message, "COORD_DATABASE_URL=postgresql+asyncpg://user:password@host:5432/database")
        return
    async with AsyncExitStack() as stack:
        engine = create_async_engine(address, pool_size=2, connect_args={"timeout": CONNECT_SECONDS, **_UNCACHED})
        stack.push_async_callback(engine.dispose)
        if (finding := await _away(engine, masked(address))) is not None:
            yield finding
            return
        try:
            async with engine.connect() as connection:
                schema = await connection.run_sync(ledger_schema)
        except RuntimeError as error:  # there are several
            yield Finding("ledger", str(error), "let the role of this URL use one of them")
            return
        client, finding = await _redis(redis, stack)
        if finding is not None:
            yield finding
        config = None if worker is None else _settings(worker)
        if config is not None:
            stack.push_async_callback(engine_of(config.session_maker).dispose)
        setup = Setup(
            engine=engine.execution_options(schema_translate_map=schema and {None: schema}),
            schema=schema,
            redis=client,
            worker=config,
            namespace=config.keys.namespace if config else namespace,
        )
        broken = False
        for check in (*CHECKS, *WITH_LEDGER):
            if broken and check in WITH_LEDGER:
                continue
            try:
                async for finding in check(setup):
                    broken = broken or finding.check == "ledger"
                    yield finding
            except Exception as error:  # noqa: BLE001 - the worker's engine may be for a server that is away
                yield Finding(check.__name__, f"this could not be looked at: {reason(error)}", "see what refuses it")


_UNCACHED = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
"""So that the doctor gets through any PgBouncer."""


async def _away(engine: AsyncEngine, address: str) -> Finding | None:
    try:
        async with asyncio.timeout(2 * CONNECT_SECONDS), engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except Exception as error:  # noqa: BLE001 - whatever keeps it from answering
        what = f"{address} cannot be used: {reason(error)}"
        if "pooling mode" in what:  # PgBouncer's words
            return Finding("pgbouncer", what, "pool_mode = transaction, or session")
        return Finding("postgresql", what, "start it, or correct the URL")
    return None


async def _redis(url: str | None, stack: AsyncExitStack) -> tuple[Redis | None, Finding | None]:
    if not url:
        what = "no Redis is named: waits go by polling, and jobs are begun by nobody"
        return None, Finding("redis", what, "--redis or COORD_REDIS_URL=redis://host:6379/0")
    try:
        client: Any = redis_from_url(url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=CONNECT_SECONDS)
    except ValueError:
        what = "the URL of Redis is malformed"
        return None, Finding("redis", what, "COORD_REDIS_URL=redis://user:password@host:6379/0")
    stack.push_async_callback(client.aclose)
    try:
        await client.execute_command("PING")
    except (RedisError, OSError) as error:
        do = "start it, or correct the URL; meanwhile waits go by polling and jobs wait"
        return None, Finding("redis", f"Redis cannot be used: {error}", do)
    return client, None


def _settings(name: str) -> WorkerConfig:
    sys.path.insert(0, str(Path.cwd()))
    module, _, attribute = name.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
        config: WorkerConfig = found.worker_config()
    except Exception as error:  # whatever a module may raise that is imported
        raise click.ClickException(f"--worker {name}: {one_line(error)}") from error
    return config
