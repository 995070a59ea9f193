"""Pictures of the console for docs/console.md: `python -m tests.pictures /tmp/aside` writes them anew."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
import uuid
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import Coordinator, Job, JobState, create_ledger, enqueue, task_options, wait_for_row_change
from coord.console import console
from coord.dev.embedded import PostgreSQL, Valkey
from coord.jobs.model import attempts, jobs
from coord.telemetry import REQUEST_ID
from tests.chromium import browsing, launched
from tests.desk import FULL
from tests.models import Base
from tests.serving import served
from tests.shop import ROOT
from tests.workers import EFFECTS, Notes

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext

    from tests.ledger import SessionMaker

PICTURES = ROOT / "docs" / "console"
WIDTHS = {"desktop": (1280, 860), "phone": (390, 844)}
SCHEMES = ("light", "dark")
KEPT = {
    *("overview-desktop-light", "overview-phone-dark", "locks-desktop-dark", "locks-phone-light"),
    *("jobs-desktop-light", "jobs-phone-dark", "job-desktop-dark", "job-phone-light"),
}
"""The rest are to be looked at, in the directory that is given."""
TASKS = {"fulfil_order": 0.4, "send_letter": 0.3, "charge_card": 0.2, "reindex": 0.1}
PAST_JOBS = 2_400
ERROR = "PartnerError: the partner answered 503 to POST /letters"
TRACEBACK = """Traceback (most recent call last):
  File "shop/letters.py", line 41, in send_letter
    answer = await partner.post("/letters", json=letter)
  File "shop/partner.py", line 18, in post
    raise PartnerError(f"the partner answered {answer.status} to POST {path}")
shop.partner.PartnerError: the partner answered 503 to POST /letters
"""


async def past(session_maker: SessionMaker) -> uuid.UUID:
    """An hour of jobs that have ended; the id of one that has failed three times."""
    chance, now = random.Random(16), datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    for _ in range(PAST_JOBS):
        ago = 3_600 * chance.random() ** 0.8
        made = now - timedelta(seconds=ago)
        task = chance.choices([*TASKS], [*TASKS.values()])[0]
        began = made + timedelta(seconds=chance.expovariate(25))
        failed = task == "send_letter" and chance.random() < 0.03
        rows.append(
            {
                "id": uuid.UUID(int=(int(made.timestamp() * 1000) << 80) | chance.getrandbits(76) | 7 << 76),
                "task": task,
                "queue": "letters" if task == "send_letter" else "default",
                "arguments": [[chance.randrange(10_000)], {}],
                "state": JobState.FAILED if failed else JobState.DONE,
                "created_at": made,
                "scheduled_at": made,
                "started_at": began,
                "finished_at": began + timedelta(seconds=chance.expovariate(8)),
                "error": ERROR if failed else None,
                "traceback": TRACEBACK if failed else None,
            }
        )
    one = next(row for row in rows if row["state"] is JobState.FAILED)
    one |= {"attempt": 3, "arguments": [[4711], {"template": "reminder"}], "trace": {REQUEST_ID: "req-7f3a"}}
    tried = [
        {
            "job_id": one["id"], "number": number, "outcome": "failed" if number == 3 else "retried", "host": "web-1",
            "pid": 4711, "error": ERROR, "traceback": TRACEBACK,
            "began": one["started_at"] + timedelta(seconds=number * 2),
            "ended": one["started_at"] + timedelta(seconds=number * 2 + 0.3),
        }
        for number in (1, 2, 3)
    ]  # fmt: skip
    one["started_at"], one["finished_at"] = tried[-1]["began"], tried[-1]["ended"]
    one["scheduled_at"] = one["started_at"] - timedelta(seconds=0.02)
    async with session_maker.begin() as session:
        names = [column.name for column in jobs.c if any(column.name in row for row in rows)]
        defaults = {"attempt": 1, "trace": None}
        await session.execute(
            insert(jobs), [{name: row.get(name, defaults.get(name)) for name in names} for row in rows]
        )
        await session.execute(insert(attempts), tried)
    found: uuid.UUID = one["id"]
    return found


@contextlib.asynccontextmanager
async def stage(directory: Path) -> Any:
    """The console served, with workers, a blocked lock, and jobs of the past."""
    async with contextlib.AsyncExitStack() as stack:
        postgresql = stack.enter_context(PostgreSQL(directory / "postgresql", settings={"fsync": "off"}))
        valkey = stack.enter_context(Valkey(directory / "valkey"))
        engine = create_async_engine(postgresql.url)
        stack.push_async_callback(engine.dispose)
        session_maker = async_sessionmaker(engine, expire_on_commit=False)
        async with engine.begin() as connection:
            await connection.execute(text('CREATE SCHEMA "Other Shop"'))
            await create_ledger(connection)
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(text(EFFECTS))
        await stack.enter_async_context(Coordinator(session_maker, redis=valkey.url))
        app = FastAPI()
        app.mount("/console", console(session_maker, full_token=FULL))
        client = await stack.enter_async_context(served(app))
        notes = Notes(directory)
        environment = {
            **os.environ,
            "COORD_DATABASE_URL": postgresql.url,
            "COORD_REDIS_URL": valkey.url,
            "COORD_TEST_NOTES": str(directory),
        }
        for _ in range(2):
            command = [sys.executable, "-m", "arq", "tests.worker_app.Settings"]
            worker = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment)
            stack.push_async_callback(worker.wait)
            stack.callback(worker.terminate)
        yield str(client.base_url), session_maker, notes


async def play(session_maker: SessionMaker, notes: Notes) -> dict[str, uuid.UUID]:
    """A lock that is held and waited for, requests that wait, jobs for later: the ids of two that are looked at."""

    async def made(task: str, *args: Any, **options: Any) -> Job:
        async with session_maker() as session:
            job = await enqueue(session, task_options(task, **options) if options else task, *args)
            await session.commit()
        return job

    failed = await past(session_maker)
    waited = await made("hold_lock", "first")
    await notes.say(waited, "locked")
    second = await made("hold_lock", "second")
    await notes.say(second, "starts")

    async def answered() -> None:
        async with session_maker() as session:
            await wait_for_row_change(session, Job, second.id, columns=[Job.state], job=second, timeout=60)

    waiting = asyncio.create_task(answered())
    await asyncio.sleep(0.5)
    notes.let("first")
    await notes.say(second, "locked")
    notes.let("second")
    await waiting
    holder = await made("hold_lock", "never")
    await notes.say(holder, "locked")
    blocked = [await made("hold_lock", "never") for _ in range(3)]
    for job in blocked:
        await notes.say(job, "starts")
    for number in range(40):
        await made("send_letter", number, queue="letters", delay=timedelta(minutes=number))
    await made("hold", "never")
    await asyncio.sleep(3)
    return {"failed": failed, "waited": second.id, "blocked": blocked[0].id}


async def photograph(context: BrowserContext, url: str, ids: dict[str, uuid.UUID], suffix: str, aside: Path) -> None:
    page = context.pages[0]
    await page.goto(f"{url}/console/")
    await page.screenshot(path=aside / f"sign-in-{suffix}.png")
    await page.get_by_label("Token").fill(FULL)
    await page.get_by_role("button", name="Sign in").click()
    pages = {"overview": "", "locks": "locks", "jobs": "jobs?state=failed", "job": f"jobs/{ids['waited']}"}
    others = {"waits": "waits", "failed": f"jobs/{ids['failed']}", "blocked": f"jobs/{ids['blocked']}", "all": "jobs"}
    others |= {"confirm": "bulk/retry?state=failed", "none": "jobs?task=none"}
    for name, path in {**pages, **others}.items():
        await page.goto(f"{url}/console/{path}")
        if name != "confirm":
            await page.locator('#pulse[data-state="live"]').wait_for()
        wide = await page.evaluate("document.documentElement.scrollWidth")
        assert wide <= page.viewport_size["width"], f"{name} {suffix} is {wide} pixels wide"  # type: ignore[index]
        kept = f"{name}-{suffix}" in KEPT
        file = (PICTURES if kept else aside) / f"{name}-{suffix}.png"
        await page.screenshot(path=file, full_page=not kept)


async def main(aside: Path) -> None:
    for place in (PICTURES, aside):
        place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as directory:
        async with stage(Path(directory)) as (url, session_maker, notes):
            ids = await play(session_maker, notes)
            async with session_maker() as session, session_maker() as another:
                waits = [
                    asyncio.ensure_future(wait_for_row_change(each, Job, ids["blocked"], timeout=300))
                    for each in (session, another)
                ]
                async with launched() as browser:
                    for (name, (width, height)), scheme in product(WIDTHS.items(), SCHEMES):
                        size = {"width": width, "height": height}
                        async with browsing(browser, viewport=size, color_scheme=scheme) as context:
                            await photograph(context, url, ids, f"{name}-{scheme}", aside)
                for wait in waits:
                    wait.cancel()
                await asyncio.gather(*waits, return_exceptions=True)
            notes.let("never")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
