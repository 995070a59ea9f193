"""Metrics by the names of the design, of every process of a server; what the dashboard and the rules ask is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert, text

from coord import WaitTimeoutError, enqueue, job_transaction, lock_tables, wait_for_row_change
from coord.dev.server import free_port
from coord.jobs.ids import new_id
from coord.jobs.model import Job, Worker
from coord.metrics import Metrics
from coord.observation import attempt_ended, tell_rescued
from coord.timings import AttemptTimings
from tests.commands import started
from tests.ledger import a_task
from tests.models import User
from tests.serving import eventually, served
from tests.shop import API, ROOT, SERVING, WORKER, WORKING, empty_database, running
from tests.workers import Office, working

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prometheus_client.samples import Sample

DOCS = ROOT / "docs"
RESCUED = Job(id=new_id(), task="t", attempt=2, state="queued", deaths=1, trace=None)
NAMES = {
    "coord_jobs": {"queue", "task", "state"},
    "coord_jobs_finished_total": {"task", "outcome"},
    "coord_queue_oldest_seconds": {"queue"},
    "coord_job_queue_seconds_bucket": {"le"},
    "coord_job_run_seconds_bucket": {"le"},
    "coord_lock_wait_seconds_bucket": {"table", "mode", "le"},
    "coord_wait_seconds_bucket": {"outcome", "le"},
    "coord_waiters": set(),
    "coord_hints_total": {"kind"},
    "coord_rescues_total": set(),
    "coord_pool_connections": {"state"},
}


async def rename(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [User]):
        (await session.get_one(User, user_id)).name = "done"


async def fail(ctx: dict[str, Any]) -> None:
    raise ValueError("no")


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    found = Metrics(CollectorRegistry())
    yield found
    found.close()


class Scrape:
    def __init__(self, body: str) -> None:
        self.samples: list[Sample] = [s for family in text_string_to_metric_families(body) for s in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Of all that have these labels; NaN if none has."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(found) if found else float("nan")

    def labels(self, name: str) -> set[str] | None:
        return next((set(s.labels) for s in self.samples if s.name == name), None)


async def scraped(metrics: Metrics, office: Office) -> Scrape:
    app = FastAPI()
    app.include_router(metrics.routes(office.session_maker))
    async with served(app) as client:
        response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return Scrape(response.text)


async def lived(metrics: Metrics, office: Office) -> None:
    """Everything happens at least once."""
    metrics.watch(office.session_maker.kw["bind"])
    async with working(office, [rename, fail]) as worker, office.session_maker() as session:
        session.add(User(id=1))
        job = await enqueue(session, rename, 1)
        await session.commit()
        await wait_for_row_change(session, User, 1, job=job, interval=20)
        await session.commit()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, User, 1, timeout=0.2)
        await session.commit()
        await office.final(await office.enqueue(fail))
        unknown = await office.enqueue(a_task)

        async def put_off() -> bool:
            return bool((await office.row(unknown)).unknown_seconds)

        await eventually(put_off)
        assert worker.lives
    tell_rescued([RESCUED, RESCUED])


async def test_each_name_of_the_design_is_scraped_with_its_labels_and_counts_what_happened(
    metrics: Metrics, office: Office, tables: None
) -> None:
    await lived(metrics, office)
    scrape = await scraped(metrics, office)
    assert {name: scrape.labels(name) for name in NAMES} == NAMES
    assert scrape.value("coord_jobs_finished_total", task="rename", outcome="done") == 1
    assert scrape.value("coord_jobs_finished_total", task="fail", outcome="failed") == 1
    assert scrape.value("coord_jobs_finished_total", task="a_task", outcome="put off") >= 1
    assert scrape.value("coord_jobs", state="failed", task="fail", queue="default") == 1
    assert scrape.value("coord_jobs", state="queued", task="a_task") == 1
    assert scrape.value("coord_job_queue_seconds_count") == 2
    assert scrape.value("coord_lock_wait_seconds_count", table="users", mode="SHARE ROW EXCLUSIVE") == 1
    assert scrape.value("coord_wait_seconds_count", outcome="changed") == 1
    assert scrape.value("coord_wait_seconds_count", outcome="timeout") == 1
    assert scrape.value("coord_hints_total", kind="heard") >= 1
    assert scrape.value("coord_hints_total", kind="published") >= 1
    assert scrape.value("coord_waiters") == 0
    assert scrape.value("coord_rescues_total") == 2
    assert scrape.value("coord_pool_connections", state="size") >= 1


def used(metrics: Metrics) -> float:
    return Scrape(metrics.text().decode()).value("coord_pool_connections", state="used")


async def test_what_is_open_is_counted_while_it_is(metrics: Metrics, office: Office, tables: None) -> None:
    async with office.session_maker() as session:
        session.add(User(id=1))
        await session.commit()
        metrics.watch(office.session_maker.kw["bind"])
        waiting = asyncio.create_task(wait_for_row_change(session, User, 1))
        await eventually(lambda: Scrape(metrics.text().decode()).value("coord_waiters") == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        async with office.session_maker() as other:
            await other.execute(text("SELECT 1"))
            await eventually(lambda: used(metrics) == 1)  # the read of the wait may take a moment to end
        await eventually(lambda: used(metrics) == 0)
    assert Scrape(metrics.text().decode()).value("coord_waiters") == 0


async def test_a_change_that_nobody_announced_is_a_hint_missed(
    metrics: Metrics, office: Office, tables: None, observer: Any
) -> None:
    await observer.execute("INSERT INTO users (id, name) VALUES (1, '')")
    async with office.session_maker() as session:
        waiting = asyncio.create_task(wait_for_row_change(session, User, 1, interval=0.3))
        await eventually(lambda: Scrape(metrics.text().decode()).value("coord_waiters") == 1)
        await asyncio.sleep(0.15)  # beyond the first read, and beyond what counts as at once
        await observer.execute("UPDATE users SET name = 'raw'")
        assert (await waiting).name == "raw"
    scrape = Scrape(metrics.text().decode())
    assert scrape.value("coord_hints_total", kind="missed") == 1
    assert scrape.labels("coord_hints_total") is not None
    assert not scrape.value("coord_hints_total", kind="heard") > 0


async def test_running_jobs_are_not_queued_and_the_oldest_is_one_that_nobody_runs(
    metrics: Metrics, office: Office
) -> None:
    running, waiting = await office.enqueue(a_task), await office.enqueue(a_task)
    beat = {"id": new_id(), "queue": "default", "host": "here", "pid": 1, "tasks": {}}
    async with office.session_maker.begin() as session:
        await session.execute(insert(Worker).values(**beat, jobs={str(running.id): {"attempt": 1}}))
        await session.execute(text("UPDATE coord_jobs SET scheduled_at = now() - interval '1 hour' WHERE id = :id"),
                              {"id": running.id})  # fmt: skip
        await session.execute(text("UPDATE coord_jobs SET scheduled_at = now() - interval '9 s' WHERE id = :id"),
                              {"id": waiting.id})  # fmt: skip
    scrape = await scraped(metrics, office)
    assert scrape.value("coord_jobs", state="running") == 1
    assert scrape.value("coord_jobs", state="queued") == 1
    assert 9 <= scrape.value("coord_queue_oldest_seconds", queue="default") < 60


async def test_a_scrape_without_a_ledger_has_the_rest(metrics: Metrics, database_url: str, redis_url: str) -> None:
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none")
    found = Office(async_sessionmaker(engine), None, redis_url, database_url)  # type: ignore[arg-type]
    scrape = await scraped(metrics, found)
    assert scrape.value("coord_waiters") == 0
    assert scrape.labels("coord_jobs") is None


async def test_a_worker_answers_on_a_port_or_writes_a_file(metrics: Metrics, tmp_path: Path) -> None:
    path = tmp_path / "coord.prom"
    async with metrics.written(path, interval=0.01):
        await eventually(lambda: asyncio.sleep(0, path.exists()))
        tell_rescued([RESCUED] * 3)
    assert Scrape(path.read_text()).value("coord_rescues_total") == 3
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208 - in an async function


ONE_OF_TWO = """
import sys
from coord.metrics import Metrics
from coord.observation import tell_waiters
metrics = Metrics()
metrics.rescued(int(sys.argv[1]))
tell_waiters(1)
print("ready", flush=True)
sys.stdin.readline()
print(metrics.text().decode())
"""


def test_an_attempt_that_has_committed_nothing_has_taken_its_time_all_the_same(metrics: Metrics) -> None:
    timings = AttemptTimings(str(RESCUED.id), 1, 0.0, lock=0.5, began=monotonic() - 2)
    attempt_ended(RESCUED, "superseded", timings, None)
    assert Scrape(metrics.text().decode()).value("coord_job_run_seconds_sum") >= 2


async def test_one_process_of_a_server_answers_for_all_of_them(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    pipes: dict[str, Any] = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for number in ("1", "2"):
            process = started(sys.executable, "-c", ONE_OF_TWO, number, cwd=ROOT, env=environment, **pipes)
            found.append(await stack.enter_async_context(process))
            assert found[-1].stdout is not None
            assert await found[-1].stdout.readline() == b"ready\n"
        first, _ = await found[0].communicate(b"\n")
        second, _ = await found[1].communicate(b"\n")
    assert Scrape(first.decode()).value("coord_rescues_total") == 3
    assert Scrape(first.decode()).value("coord_waiters") == 2
    assert Scrape(second.decode()).value("coord_rescues_total") == 3  # what was counted stays
    assert Scrape(second.decode()).value("coord_waiters") == 1  # and what was open is not


def queries() -> list[tuple[str, str]]:
    board = json.loads((DOCS / "grafana-dashboard.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"][0]["rules"]
    return found + [(rule["alert"], rule["expr"]) for rule in rules]


async def test_the_dashboard_and_the_rules_ask_for_what_a_scrape_has(
    metrics: Metrics, office: Office, tables: None
) -> None:
    await lived(metrics, office)
    scrape = await scraped(metrics, office)
    asked = set()
    for title, query in queries():
        names = set(re.findall(r"\bcoord_\w+", query))
        assert names, title
        known = set()
        for name in names:
            labels = scrape.labels(name)
            assert labels is not None, f"{title}: no {name}"
            known |= labels
        grouped = {label for part in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", part)}
        matched = re.findall(r'(\w+)=~?"([^"]*)"', query)
        assert grouped | {label for label, _ in matched} <= known | {"instance"}, title
        for label, values in matched:
            seen = {s.labels[label] for s in scrape.samples if s.name in names and label in s.labels}
            assert {*values.split("|")} - {"retried", "missed"} <= seen, title
        asked |= {name for name in NAMES if name in query}
    assert asked == NAMES.keys()


async def test_the_shop_answers_prometheus_in_its_api_and_on_its_workers_port(
    database_url: str, redis_url: str
) -> None:
    port, host = free_port(), "127.0.0.2"  # not the one that it has unless told otherwise
    async with empty_database(database_url) as database, running(API, database, redis_url) as api:
        url = (await api.says(SERVING, within=60))[1]
        work = running(WORKER, database, redis_url, COORD_METRICS_PORT=str(port), COORD_METRICS_HOST=host)
        async with work as worker, httpx.AsyncClient() as client:
            await worker.says(WORKING, within=60)
            placed = (await client.post(f"{url}/orders", json={"sku": "tea", "quantity": 1})).json()
            answer = await client.post(f"{url}/orders/{placed['id']}/fulfil", timeout=30)
            assert answer.json()["status"] == "rejected"
            assert "total;dur=" in answer.headers["server-timing"]
            of_api = Scrape((await client.get(f"{url}/metrics")).text)
            of_worker = Scrape((await client.get(f"http://{host}:{port}/metrics")).text)
    assert of_api.value("coord_wait_seconds_count", outcome="changed") == 1
    assert of_worker.value("coord_jobs_finished_total", task="fulfil_order", outcome="done") == 1
