"""A Redis that is full, and one that allows a worker no more than the documentation says, or less."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from arq import cron
from arq.worker import func
from sqlalchemy import make_url

from coord import job_transaction, task_options
from coord.dev.embedded import Valkey
from coord.queue.scripts import MOVE
from tests.serving import eventually
from tests.workers import KEYS, Office, client, opened, working

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENTED = Path(__file__).parents[1] / "docs" / "operation.md"
FULL = 20_000_000


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "valkey") as server:
        yield server


async def task(ctx: dict[str, Any]) -> None:
    async with job_transaction(ctx):
        """Nothing."""


async def test_a_full_redis_drains(ledger: None, database_url: str, valkey: Valkey) -> None:
    """Nothing that a worker does needs room: what waits in the feed, and what comes due meanwhile, is done."""
    async with opened(database_url, valkey.url) as office:
        waiting = [await office.enqueue(task) for _ in range(50)]
        near = [await office.enqueue(task_options(task, delay=1.0 + n / 10)) for n in range(10)]
        await office.waiting(60)
        await office.redis.config_set("maxmemory", "1")
        async with working(office, [task]):
            rows = [await office.final(job, within=20) for job in [*waiting, *near]]
            assert {(row.state, row.attempt) for row in rows} == {("done", 1)}
            assert int(await office.redis.zcard(KEYS.feed)) + int(await office.redis.zcard(KEYS.soon)) == 0


async def test_what_comes_due_in_a_full_redis_is_moved_and_not_lost(valkey: Valkey) -> None:
    """The script takes a message out first: a full Redis refuses one that begins by putting it elsewhere."""
    redis: Any = client(valkey.url)
    await redis.zadd(KEYS.soon, {f"100{{{n}}}": 1 for n in range(20)})
    await redis.config_set("maxmemory", "1")
    assert await redis.eval(MOVE, 2, KEYS.feed, KEYS.soon, 500) == -1
    assert (await redis.zcard(KEYS.feed), await redis.zcard(KEYS.soon)) == (20, 0)
    await redis.aclose()


def documented() -> tuple[list[str], list[str]]:
    """What coord needs, and what arq needs beside it, as the page says."""
    found = re.search(r"Rights: `([^`]*)` for coord, and `([^`]*)`", " ".join(DOCUMENTED.read_text().split()))
    assert found is not None
    return found[1].split(), found[2].split()


async def allow(office: Office, name: str, rights: list[str], *refused: str) -> str:
    """A user that has these rights, on the documented keys and channels, and no other; his URL."""
    own = ["~{coord:*", "~arq:*", "&coord:*"]
    rules = ["resetkeys", "resetchannels", "-@all", *own, "on", ">secret", *rights, *refused]
    redis: Any = office.redis
    await redis.execute_command("ACL", "SETUSER", name, *rules)
    url = make_url(office.redis_url).set(username=name, password="secret")
    return url.render_as_string(hide_password=False)


async def test_the_documented_rights_are_enough(
    ledger: None, database_url: str, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """An API with coord's own; a worker with arq's as well, whose own jobs and cron run, too."""
    own, arqs = documented()
    ran: list[str] = []
    ticked = asyncio.Event()

    async def plain(ctx: dict[str, Any]) -> None:
        ran.append("arq's own")

    async def tick(ctx: dict[str, Any]) -> None:
        ticked.set()

    async with opened(database_url, valkey.url, coordinated=False) as admin:
        api, worker = await allow(admin, "api", own), await allow(admin, "worker", [*own, *arqs])
        options: dict[str, Any] = {"queue_name": "arq:queue", "poll_delay": 0.05, "redis": worker}
        cron_jobs = [cron(tick, second=set(range(60)), microsecond=0)]
        functions = [task, func(plain, name="plain")]
        async with opened(database_url, api) as office, working(office, functions, cron_jobs=cron_jobs, **options):
            jobs = [await office.enqueue(task), await office.enqueue(task_options(task, delay=1))]
            await admin.redis.enqueue_job("plain")
            script = await admin.enqueue(task)
            for job in [*jobs, script]:
                assert (await office.final(job, within=15)).state == "done"
            await eventually(lambda: ran, within=10)
            await asyncio.wait_for(ticked.wait(), 10)
            await eventually(lambda: admin.redis.keys("*health*"), within=10)
        redis: Any = admin.redis
        assert await redis.execute_command("ACL", "LOG") == []
    assert "NOPERM" not in caplog.text
    assert "no permissions" not in caplog.text


@pytest.mark.parametrize("refused", ["-@sortedset", "-@pubsub", "-@scripting", "-time"])
async def test_a_right_that_is_missing_is_said_as_what_it_is_and_waited_for(
    ledger: None, database_url: str, valkey: Valkey, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    """And what waited runs once it is granted."""
    own, arqs = documented()
    async with opened(database_url, valkey.url, coordinated=False) as admin:
        url = await allow(admin, "worker", [*own, *arqs])
        async with working(admin, [task], redis=url) as worker:
            assert (await admin.final(await admin.enqueue(task), within=15)).state == "done"
            await allow(admin, "worker", [*own, *arqs], refused)
            job = await admin.enqueue(task)
            await eventually(lambda: re.search("(?i)jobs wait.*(no permissions|NOPERM)", caplog.text), within=15)
            await allow(admin, "worker", [*own, *arqs])
            assert (await admin.final(job, within=20)).state == "done"
            assert worker.lives
