"""The processes of a copy, what is done to them, and what clients record."""

from __future__ import annotations

import itertools
import json
import os
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import httpx
import redis.asyncio

from coord.dev.process import end, spawn
from coord.dev.server import free_port
from coord.jobs.model import Job
from coord.testing.history import (
    Bounds,
    Calm,
    Effect,
    HistoryFile,
    LedgerJob,
    Number,
    Outcome,
    Recorder,
    Row,
    Verdict,
    check,
)
from coord.testing.proof import Shown, Visit
from tests.serving import eventually
from tests.shop import dsn_of
from tests.workers import KEYS, given

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator
    from pathlib import Path

JOBS = """
    SELECT id, state, attempt, arguments->0->>0 AS parcel, arguments::text AS arguments, task, queue, priority,
        extract(epoch FROM created_at)::float8 AS created, extract(epoch FROM finished_at)::float8 AS finished
    FROM coord_jobs
"""
LABELS = "SELECT parcel, count(*) AS times, max(number) AS number FROM labels GROUP BY parcel"


class World:
    def __init__(
        self,
        directory: Path,
        urls: dict[str, str],
        recorder: Recorder,
        http: httpx.AsyncClient,
        database: asyncpg.Connection,
        stack: AsyncExitStack,
    ) -> None:
        self.directory = directory
        self.recorder = recorder
        self.http = http
        self.database = database
        self.bounds = Bounds(late=2.0, final=20.0)
        self._urls = urls
        self._stack = stack
        self._numbers = itertools.count()

    async def worker(self) -> subprocess.Popen[bytes]:
        """One more; waited for until its heartbeat was seen."""
        process = _started(self, "arq", "parcels.Settings")
        self._stack.callback(end, process, grace=0)

        async def is_known() -> bool:
            if process.poll() is not None:
                raise AssertionError(self.logs())
            known = "SELECT count(*) FROM coord_workers WHERE pid = $1"
            return bool(await self.database.fetchval(known, process.pid))

        await eventually(is_known, within=30)
        return process

    def logs(self) -> str:
        return "".join(path.read_text()[-2000:] for path in self.directory.glob("*.log"))

    def visit(self) -> Visit:
        """A client that asks one thing at a time."""
        return Visit(next(self._numbers), 0, self.http, self.recorder, lambda: 0, lambda _: None)

    async def post(self, name: str, *, wait: float = 10.0, **plan: Any) -> None:
        """Have a parcel labelled; `wait` is a whole number, as RFC 7240 has it."""
        headers = {"Prefer": f"wait={wait:g}"}
        given = {"name": name, "wait": wait, **{key.replace("_", " "): value for key, value in plan.items()}}
        given |= {key: plan[key] for key in ("unique_key", "one_at_a_time") if key in plan}
        await self.visit().send(
            "POST", "/parcels", json=given, headers=headers, effect=name, deadline=wait, shows=labelled
        )

    async def get(self, name: str, **parameters: Any) -> None:
        """Read by somebody else."""

        def shows(answer: httpx.Response) -> Shown:
            return seen(answer) or Shown(row=name, version=0)

        await self.visit().send("GET", f"/parcels/{name}", params=parameters, shows=shows)

    async def put(self, name: str, **parameters: Any) -> None:
        await self.visit().send("PUT", f"/parcels/{name}", params=parameters, shows=seen)

    async def step(self, name: str) -> None:
        await self.visit().send("POST", f"/parcels/{name}/steps", shows=seen)

    async def stream(self, name: str, last: int) -> None:
        """Of a parcel, until it is in its last version."""
        began = self.recorder.now()
        async with self.http.stream("GET", f"/parcels/{name}/events") as answer:
            async for line in answer.aiter_lines():
                shown: dict[str, Any] = {"observer": f"stream of {name}", "row": name, "version": int(line)}
                self.recorder.operation("GET events", began, Outcome.READ, answer="event", **shown)
                if int(line) == last:
                    return

    async def has_label(self, name: str) -> None:
        await eventually(
            lambda: self.database.fetchval("SELECT count(*) FROM labels WHERE parcel = $1", name), within=20
        )

    async def is_running(self, name: str) -> None:
        """Some heartbeat names the job."""
        named = """
            SELECT count(*) FROM coord_workers, json_object_keys(jobs::json) AS job
            WHERE job IN (SELECT id::text FROM coord_jobs WHERE arguments->0->>0 = $1)
        """
        await eventually(lambda: self.database.fetchval(named, name), within=20)

    async def has_lock(self) -> None:
        held = """
            SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = relation
            WHERE relname = 'parcels' AND mode = 'ShareRowExclusiveLock' AND granted
        """
        await eventually(lambda: self.database.fetchval(held), within=20)

    async def all_final(self, within: float = 20.0) -> None:
        """Or not, when the time is up: it is for the checker to say."""
        queued = "SELECT count(*) = 0 FROM coord_jobs WHERE state = 'queued'"
        try:
            await eventually(lambda: self.database.fetchval(queued), within=within)
        except AssertionError:
            return

    async def deliver_again(self, name: str, attempt: int | None = None) -> None:
        """What the feed has once more, as after a message that was taken for lost; return when a worker has it."""
        row = await self.database.fetchrow("SELECT * FROM coord_jobs WHERE arguments->0->>0 = $1", name)
        values = {**row, "arguments": json.loads(row["arguments"]), "attempt": attempt or row["attempt"]}
        async with redis.asyncio.Redis.from_url(self._urls["COORD_REDIS_URL"]) as client:
            async with client.pipeline() as pipe:
                given(pipe, Job(**values))
                await pipe.execute()
            await eventually(lambda: _is_empty(client), within=10)

    async def flush(self) -> None:
        async with redis.asyncio.Redis.from_url(self._urls["COORD_REDIS_URL"]) as client:
            await client.flushall()

    async def calm(self) -> None:
        """The fault is over, or goes on for good: from now on jobs have their time."""
        self.recorder.write(Calm(await self.database.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")))

    async def judged(self) -> Verdict:
        await self.all_final(self.bounds.final)
        for job in await self.database.fetch(JOBS):
            times = (job["created"], job["finished"], job["attempt"])
            self.recorder.write(LedgerJob(str(job["id"]), job["parcel"], job["state"], *times))
        for put in await self.database.fetch(LABELS):
            self.recorder.write(Effect(put["parcel"], f"label {put['number']}", put["times"]))
        for parcel in await self.database.fetch("SELECT name, label, version FROM parcels"):
            self.recorder.write(Row(parcel["name"], parcel["version"]))
            if parcel["label"] is not None:
                self.recorder.write(Number("label", parcel["label"], parcel["name"]))
        self.recorder.__exit__()
        return check(HistoryFile(self.directory / "history.jsonl"), self.bounds)


async def _is_empty(client: Any) -> bool:
    return not await client.zcard(KEYS.feed)


def seen(answer: httpx.Response) -> Shown | None:
    if not answer.is_success:
        return None
    parcel = answer.json()
    return Shown(row=parcel["name"], version=parcel["version"]) if "version" in parcel else None


def labelled(answer: httpx.Response) -> Shown | None:
    if not answer.is_success:
        return None
    parcel = answer.json()
    effect = None if parcel["label"] is None or answer.status_code == 202 else f"label {parcel['label']}"
    job = str(UUID(parcel["job"])) if "job" in parcel else None
    return Shown(effect, parcel["name"], parcel["version"], job)


def _started(world: World, *command: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(world.directory), **world._urls}
    with (world.directory / f"{command[0]}-{next(world._numbers)}.log").open("ab") as log:
        return spawn([sys.executable, "-m", *command], stdout=log, env=environment, directory=world.directory)


@asynccontextmanager
async def running(directory: Path, database_url: str, redis_url: str) -> AsyncIterator[World]:
    """The copy's API, and no worker yet; everything is killed at the end."""
    port = free_port()
    urls = {"COORD_DATABASE_URL": database_url, "COORD_REDIS_URL": redis_url}
    async with AsyncExitStack() as stack:
        database = await asyncpg.connect(dsn_of(database_url))
        stack.push_async_callback(database.close)
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        )
        recorder = stack.enter_context(Recorder(directory / "history.jsonl"))
        world = World(directory, urls, recorder, http, database, stack)
        api = _started(world, "uvicorn", "parcels:app", "--port", str(port))
        stack.callback(end, api, grace=0)

        async def serves() -> bool:
            try:
                return (await http.get("/openapi.json")).is_success
            except httpx.ConnectError:
                if api.poll() is not None:
                    raise AssertionError(world.logs()) from None
                return False

        await eventually(serves, within=30)
        yield world
