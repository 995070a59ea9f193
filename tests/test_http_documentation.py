"""The pages on HTTP and security say what the code does: their application behaves, their numbers are the code's."""

from __future__ import annotations

import asyncio
import re

import pytest

from coord.http import events, jobs, limits
from coord.http.idempotency import EXPIRY_SECONDS, MAX_KEY_LENGTH
from coord.http.problem import KINDS, MAX_ERRORS
from coord.jobs.queries import MAX_LISTED_JOBS
from coord.waiting.watcher import MAX_WAITERS
from tests.counter import do, placed, the_job
from tests.pages import Namespace, prose, run
from tests.raw import call
from tests.serving import served
from tests.shop import ROOT
from tests.waits import registered

DOCS = ROOT / "docs"


async def test_the_application_of_the_http_page_behaves(namespace: Namespace) -> None:
    session_maker = namespace["session_maker"]
    await run(DOCS / "http.md", namespace)
    path = f"/orders/{await placed(session_maker)}"
    async with served(namespace["app"]) as client:
        accepted = await client.post(f"{path}/fulfil", headers={"Prefer": "respond-async", "Idempotency-Key": "k"})
        assert accepted.status_code == 202
        asking = asyncio.create_task(client.post(f"{path}/fulfil", headers={"Idempotency-Key": "k"}))
        polling = asyncio.create_task(client.get(path, headers={"If-None-Match": "*", "Prefer": "wait=20"}))
        async with call(str(client.base_url), "GET", f"{path}/events") as stream:
            first = await (await stream.begun()).event()
            await registered(4)
            await do(session_maker, await the_job(session_maker))
            second = await stream.event()
        assert first is not None
        assert second is not None
        assert second.data == (await asking).json() == (await polling).json() == first.data | {"status": "fulfilled"}
        assert (await client.get("/orders/0")).json()["status"] == 404
        assert (await client.post("/orders/0/fulfil", headers={"Idempotency-Key": "k"})).status_code == 422


async def test_the_routes_of_the_security_page_need_their_token(namespace: Namespace) -> None:
    await run(DOCS / "security.md", namespace)
    async with served(namespace["app"]) as client:
        assert (await client.get("/jobs")).status_code == 401
        token = {"Authorization": "Bearer correct horse battery"}
        assert (await client.get("/jobs", headers=token)).status_code == 200


def test_every_type_of_problem_is_on_the_page_under_its_status() -> None:
    rows = re.findall(r"^\| (`.*?) \| (\d+) \|", (DOCS / "problems.md").read_text(), re.MULTILINE)
    listed = {(name, int(status)) for names, status in rows for name in re.findall(r"`(.*?)`", names)}
    assert listed == {(kind.name, kind.status) for kind in KINDS}


@pytest.mark.parametrize(
    ("page", "says", "value", "expected"),
    [
        ("http", "when time is up: 25 s", limits.MAX_WAIT_SECONDS, 25),
        ("http", "locks and for the row: 2 s after time is up", limits.ANSWER_MARGIN_SECONDS, 2),
        ("http", "bare token of up to 255 characters", MAX_KEY_LENGTH, 255),
        ("http", "expire after a day", EXPIRY_SECONDS, 86_400),
        ("http", "One more than 1,000 in a process", events.MAX_STREAMS, 1_000),
        ("http", "by itself after 60 s", events.MAX_DURATION_SECONDS, 60),
        ("security", "| an event stream | 60 s |", events.MAX_DURATION_SECONDS, 60),
        ("security", "| 1,000,000 bytes, announced or counted | 413 |", limits.MAX_BODY_BYTES, 1_000_000),
        ("security", "| 16,384 bytes | 431 |", limits.MAX_HEAD_BYTES, 16_384),
        (
            "security",
            "| `Prefer: wait=N` or 25 s, and 2 s; 4 s or more | 503",
            (limits.MAX_WAIT_SECONDS, limits.ANSWER_MARGIN_SECONDS),
            (25, 2),
        ),
        ("security", "faults told of one request | 20 |", MAX_ERRORS, 20),
        ("security", "event streams of a process | 1,000 |", events.MAX_STREAMS, 1_000),
        ("security", "waits of a process | 20,000 |", MAX_WAITERS, 20_000),
        ("security", "`Idempotency-Key` | 255 characters | 400 |", MAX_KEY_LENGTH, 255),
        ("security", "jobs in one list | 1,000 | 422 |", MAX_LISTED_JOBS, 1_000),
        ("security", "`COORD_ADMIN_TOKEN`, 16 characters or more", jobs.MIN_TOKEN_LENGTH, 16),
    ],
)
def test_a_number_on_a_page_is_the_codes(page: str, says: str, value: object, expected: object) -> None:
    assert says in prose(DOCS / f"{page}.md")
    assert value == expected
