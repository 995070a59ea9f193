"""Load, faults and checker against an application: ends by itself, with a verdict and the seed that repeats it."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from coord.testing.history import Bounds, Calm, HistoryFile, LedgerJob, Outcome, Recorder, check
from coord.testing.proof.client import GaveUp, Visit
from coord.testing.proof.faults import Fault, Storm, forecast
from coord.testing.proof.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    import asyncpg

    from coord.testing.history import Operation, Record, Verdict
    from coord.testing.proof.application import Application

    Client = Callable[[Visit], Awaitable[object]]
    EffectOf = Callable[[str, list[Any], dict[str, Any]], str | None]
    Read = Callable[[asyncpg.Connection], AsyncIterator[Record]]

LATE_SECONDS = 6.0
"""The contract's one, and five for two processors that run servers, clients and application together."""
MAX_CLIENTS = 1000
"""At a time; of more the next waits."""
TOLD_SECONDS = 5.0
SETTLED_SECONDS = 0.2
TIMEOUT_SECONDS = 60.0
"""Of a request: longer than any deadline that is to be judged."""
JOBS = """
    SELECT id, task, arguments, state, attempt,
        extract(epoch FROM created_at)::float8 AS created, extract(epoch FROM finished_at)::float8 AS finished
    FROM coord_jobs ORDER BY id
"""
DUE = "SELECT EXISTS (SELECT FROM coord_jobs WHERE state = 'queued' AND scheduled_at <= now() + $1)"
NOT_DUE = "SELECT count(*) FROM coord_jobs WHERE state = 'queued' AND scheduled_at > now()"


@dataclass(frozen=True, slots=True)
class Proof:
    seed: int
    verdict: Verdict
    report: str
    history: Path
    """To be checked again with `python -m coord.testing.history`; logs are beside it."""

    @property
    def holds(self) -> bool:
        return self.verdict.holds

    def __str__(self) -> str:
        return self.report


class Load:
    """Clients, one after the other at a pace, and what came of their requests."""

    def __init__(self, recorder: Recorder, storm: Storm) -> None:
        self._recorder = recorder
        self._storm = storm
        self._began = recorder.now()
        self._seconds: Counter[float] = Counter()
        self.asked: Counter[Outcome] = Counter()
        self.clients = 0

    async def come(self, client: Client, url: str, pace: float, seconds: float, seed: int) -> None:
        """Return when the last of them has what it came for, or has given up."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        places, self._began = asyncio.Semaphore(MAX_CLIENTS), self._recorder.now()
        options: dict[str, Any] = {"base_url": url, "timeout": TIMEOUT_SECONDS, "limits": limits, "trust_env": False}
        async with httpx.AsyncClient(**options) as http, asyncio.TaskGroup() as visits:
            for number in range(round(pace * seconds)):
                await asyncio.sleep(self._began + number / pace - self._recorder.now())
                await places.acquire()
                visit = Visit(number, seed, http, self._recorder, lambda: self._storm.calm, self._note)
                visits.create_task(_served(client, visit)).add_done_callback(lambda _: places.release())
                self.clients += 1

    def _note(self, operation: Operation) -> None:
        self.asked[operation.outcome] += 1
        if operation.outcome is Outcome.DONE:
            self._seconds[float(f"{operation.ended - operation.began:.1e}")] += 1

    def percentile(self, part: float) -> float:
        """Seconds from request to answer, of those answered with their effect, to two digits."""
        left = part * self._seconds.total()
        for seconds in sorted(self._seconds):
            left -= self._seconds[seconds]
            if left <= 0:
                return seconds
        return 0.0

    def __str__(self) -> str:
        told = {Outcome.DONE: "with their effect", Outcome.PROMISED: "promised", Outcome.READ: "reads"}
        told[Outcome.UNKNOWN] = "errors"
        counted = ", ".join(f"{self.asked[outcome]:,} {what}" for outcome, what in told.items())
        return f"{self.asked.total():,} requests by {self.clients:,} clients: {counted}"


async def _served(client: Client, visit: Visit) -> None:
    try:
        await client(visit)
    except GaveUp:
        """It is in the history."""


async def prove(
    application: Application,
    client: Client,
    *,
    effect_of: EffectOf,
    read: Read,
    prepare: Callable[[httpx.AsyncClient], Awaitable[object]] | None = None,
    seconds: float = 30.0,
    pace: float = 10.0,
    seed: int | None = None,
    faults: Iterable[Fault] = tuple(Fault),
    bounds: Bounds | None = None,
    directory: Path | None = None,
    tell: Callable[[str], object] = print,
) -> Proof:
    """Start the application on servers of its own, let `pace` clients a second in, and do `faults` to it meanwhile.

    `client` is called for each, with a `Visit`. Afterwards the jobs have `bounds.final` seconds to come to their end;
    those that are not due by then are not waited for, and the report says how many.
    `effect_of` names the effect that a job is for, by its task, its arguments and its keyword arguments, as requests
    name it; None for a job that is not looked at. `read` is given a connection of asyncpg, in a transaction, and
    yields what is there: `Effect`, `Row`, `Number`, and a `Complaint` for whatever else must not be.
    `prepare` is called once, with a client of httpx, before the first client comes.

    Without a seed a random one is taken; the same seed gives the same faults at the same times, and clients the same
    `Visit.random`. Everything is stopped when it returns; the history and all logs stay in `directory`.
    """
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    bounds = bounds or Bounds(late=LATE_SECONDS)
    if len(application.workers) < 2:
        raise ValueError("a proof needs two workers: one is killed, and the other shows what comes of it")
    directory = directory or Path(tempfile.mkdtemp(prefix="coord-proof-"))
    stack, history = Stack(application, directory), directory / "history.jsonl"
    tell(f"coord proof, {seconds:g} s, {pace:g} clients a second, {len(application.workers)} workers, seed {seed}")
    with Recorder(history) as recorder:
        async with stack.running():
            url = f"http://127.0.0.1:{stack.port}"
            if prepare is not None:
                async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False) as http:
                    await prepare(http)
            storm = Storm(stack, recorder, seed)
            load = Load(recorder, storm)
            async with _telling(recorder, load, storm, tell), asyncio.TaskGroup() as tasks:
                tasks.create_task(load.come(client, url, pace, seconds, seed))
                await storm.rage(forecast(seconds, seed, faults))
                recorder.write(Calm(await _clock(stack)))
            not_due = await _settled(stack, bounds.final)
            await _write_end(stack, recorder, effect_of, read)
    verdict = check(HistoryFile(history), bounds)
    proof = Proof(seed, verdict, _report(verdict, load, storm, not_due, seed, history), history)
    tell(str(proof))
    return proof


@asynccontextmanager
async def _telling(recorder: Recorder, load: Load, storm: Storm, tell: Callable[[str], object]) -> AsyncIterator[None]:
    async def telling() -> None:
        began = recorder.now()
        while True:
            await asyncio.sleep(TOLD_SECONDS)
            tell(
                f"  {recorder.now() - began:5.0f} s  {load}; {storm.done.total()} faults, last: {storm.last or 'none'}"
            )

    task = asyncio.create_task(telling(), name="coord proof tells")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _clock(stack: Stack) -> float:
    connection = await stack.connect()
    try:
        return float(await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8"))
    finally:
        await connection.close()


async def _settled(stack: Stack, limit: float) -> int:
    connection = await stack.connect()
    try:
        return await settled(connection, limit)
    finally:
        await connection.close()


async def settled(connection: asyncpg.Connection, limit: float) -> int:
    """Return when no job is queued that is due in time, or all have had theirs: how many are not due yet."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit + 1
    while await connection.fetchval(DUE, timedelta(seconds=deadline - loop.time())):
        if loop.time() > deadline:
            break
        await asyncio.sleep(SETTLED_SECONDS)
    return int(await connection.fetchval(NOT_DUE))


async def _write_end(stack: Stack, recorder: Recorder, effect_of: EffectOf, read: Read) -> None:
    connection = await stack.connect()
    try:
        async with connection.transaction(isolation="repeatable_read"):
            async for job in connection.cursor(JOBS):
                effect = effect_of(job["task"], *json.loads(job["arguments"]))
                times = (job["created"], job["finished"], job["attempt"])
                recorder.write(LedgerJob(str(job["id"]), effect, job["state"], *times))
            async for record in read(connection):
                recorder.write(record)
    finally:
        await connection.close()


def _report(verdict: Verdict, load: Load, storm: Storm, not_due: int, seed: int, history: Path) -> str:
    later = f"; {not_due:,} jobs are not due yet, and were not waited for" if not_due else ""
    done = ", ".join(f"{times} × {kind}" for kind, times in sorted(storm.done.items())) or "none"
    end = "everything holds" if verdict.holds else f"BROKEN: {', '.join(verdict.counts)}"
    return "\n".join(
        [
            "",
            f"  faults    {done}",
            f"  clients   {load}",
            f"  answered  half within {load.percentile(0.5):g} s, 99 % within {load.percentile(0.99):g} s",
            f"  in the end {verdict.records['LedgerJob']:,} jobs, {verdict.records['Effect']:,} effects{later}",
            "",
            *(f"  {line}" for line in str(verdict).splitlines()),
            "",
            f"  {end}; seed {seed} repeats it, the history is {history}",
        ]
    )
