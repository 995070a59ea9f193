"""The shop's OpenAPI document is true: of what schemathesis asks for, of anything odd, and of each of its links."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from coord.http import Preference
from tests.commands import ended
from tests.contract import Contract
from tests.shop import API, SERVING, WORKER, WORKING, emptied, empty_database, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.slow

TOKEN = "correct-horse-battery"
SECONDS = 10.0
USUAL = {200, 201, 202, 304, 400, 401, 404, 422}
HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much]

SCHEMATHESIS = """
[[operations]]
# A stream without an end. `test_odd_requests_have_declared_answers` looks at how it begins.
include-operation-id = "order_events"
enabled = false

[[operations]]
# Whether a key is valid depends on what it was used for before; the schema cannot say so.
include-operation-id = "fulfil_order"
checks.positive_data_acceptance.expected-statuses = ["2xx", "404", "409", "422"]
"""
HOOKS = """
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    # To JSON Schema 3.0 is an integer; to the shop a quantity is one that is written as one.
    if isinstance(case.body, dict) and isinstance(quantity := case.body.get("quantity"), float):
        case.body["quantity"] = int(quantity) if quantity.is_integer() else quantity
    # Else hardly any answer were a 202, whose links lead to jobs.
    if case.operation.label == "POST /orders/{order_id}/fulfil" and len(case.id) and case.id[-1] > "V":
        case.headers["Prefer"] = "respond-async"
"""


@dataclass
class Stack:
    """The whole shop."""

    url: str
    contract: Contract
    document: dict[str, Any]
    authorization: dict[str, str]


@pytest.fixture(scope="module")
async def stack(database_url: str, redis_url: str) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as opened:
        await emptied(redis_url)
        url = await opened.enter_async_context(empty_database(database_url))
        api = await opened.enter_async_context(running(API, url, redis_url, COORD_ADMIN_TOKEN=TOKEN))
        worker = await opened.enter_async_context(running(WORKER, url, redis_url))
        address = (await api.says(SERVING))[1]
        await worker.says(WORKING)
        http = await opened.enter_async_context(httpx.AsyncClient(base_url=address))
        document = (await http.get("/openapi.json")).json()
        yield Stack(address, Contract(document), document, {"Authorization": f"Bearer {TOKEN}"})
        assert api.count("Traceback|ERROR") == 0, api.lines


async def test_schemathesis_finds_nothing(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    (tmp_path / "hooks.py").write_text(HOOKS)
    for seconds in (SECONDS, 4 * SECONDS):  # in which a slow machine does not come to the links
        output = await schemathesis(stack, tmp_path, seconds)
        if covered(output) >= 6:
            return
    raise AssertionError(output)


def covered(output: str) -> int:
    links = re.search(r"API Links: +(\d+) covered", output)
    assert links is not None, output
    return int(links[1])


async def schemathesis(stack: Stack, directory: Path, seconds: float) -> str:
    """What it says, having found nothing."""
    status, output, _ = await ended(
        *(str(Path(sys.executable).parent / "st"), "run", f"{stack.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {TOKEN}", "--max-time", str(int(seconds)), "--max-examples", "20"),
        *("--request-timeout", "40", "--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"),
        cwd=directory,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(directory), "NO_COLOR": "1"},
        stderr=subprocess.STDOUT,
    )
    assert status == 0, output
    return output


PIECES = ["wait", "respond-async", "=", ",", ";", '"', "\\", " ", "\t", "0", "1", "*", "W/", "-", "\xe9", "{", "\xad"]
ODD = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=30),
    st.just("9" * 5_000),
).map(lambda text: text.strip(" \t\xa0"))
KNOWN = {
    "Prefer": ["wait=0", "wait=1", "respond-async", "respond-async, wait=1"],
    "If-None-Match": ["*", '"1"', '"2", "1"', 'W/"2"'],
    "Idempotency-Key": ["key", '"key"', '"another"'],
    "Last-Event-ID": ["1", "1-done", "0"],
    "Authorization": ["Bearer x"],
    "Content-Type": ["application/json", "text/plain", "application/problem+json; charset=latin-1"],
}
HEADERS = st.fixed_dictionaries(
    {}, optional={name: st.one_of(st.sampled_from(values), ODD) for name, values in KNOWN.items()}
)
NUMBERS = st.one_of(st.integers(-3, 10**6), st.integers(), st.floats(), st.booleans(), st.none(), st.text())
ORDERS = st.fixed_dictionaries({}, optional={"sku": st.one_of(st.just("tea"), NUMBERS), "quantity": NUMBERS})
BODIES = st.one_of(
    st.sampled_from([b'{"sku": "tea", "quantity": 1}', b"", b"[" * 9_999]),
    ORDERS.map(json.dumps).map(str.encode),
    st.binary(max_size=60),
)
ANYTHING = st.sampled_from(["0", "x", "%00", "9" * 30, "-1", "1.0", "%F0%9F%8D%B5", "a.b"])
PLACES = {"order_id": ["a pending order", "a fulfilled order"], "job_id": ["a job"], "sku": ["tea"]}


@st.composite
def targets(draw: st.DrawFn, operations: list[tuple[str, str]]) -> tuple[str, str, str]:
    """A method, a path, and what is at the place of its parameter."""
    method, path = draw(st.sampled_from(operations))
    parameter = re.search(r"\{(\w+)\}", path)
    known = st.sampled_from(PLACES[parameter[1]] if parameter else [""])
    return method, path, draw(st.one_of(known, known, ANYTHING))


async def test_odd_requests_have_declared_answers(stack: Stack) -> None:
    """No 5xx but declared ones; of an event stream the beginning is looked at."""
    with httpx.Client(base_url=stack.url, timeout=40) as http:
        statuses = await asyncio.to_thread(fuzz, stack, http)
    assert {*statuses} >= USUAL, statuses


def fuzz(stack: Stack, http: httpx.Client) -> Counter[int]:
    """For its seconds, and on a slow machine until chance has come upon what is usual."""
    began = time.monotonic()
    statuses: Counter[int] = Counter()
    paths = stack.document["paths"]
    operations = [(verb.upper(), path) for path, verbs in paths.items() for verb in verbs]
    rare = {"202", "304"}
    operations += 8 * [(verb, path) for verb, path in operations if rare & {*paths[path][verb.lower()]["responses"]}]
    job, order = accepted(http)
    known = {"a fulfilled order": order.removeprefix("/orders/"), "a job": job}

    # Where CI is set, Hypothesis would draw the same hundred examples in every round.
    @settings(
        max_examples=100,
        derandomize=False,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=HEALTH,
    )
    @given(targets(operations), HEADERS, st.booleans(), BODIES)
    def ask(target: tuple[str, str, str], headers: dict[str, str], known_to: bool, body: bytes) -> None:
        method, path, place = target
        assume((Preference.of([headers.get("Prefer", "")]).wait or 0) <= 1)  # an hour's worth, but not an hour
        if place == "a pending order":
            known[place] = placed(http).removeprefix("/orders/")
        path = re.sub(r"\{\w+\}", known.get(place, place), path)
        fields = {"Content-Type": "application/json", **headers, **(stack.authorization if known_to else {})}
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        with http.stream(method, path, headers=encoded, content=body) as answer:
            streams = answer.status_code == 200 and path.endswith("/events")
            text = (
                next(answer.iter_raw())
                if streams and "Last-Event-ID" not in headers
                else b""
                if streams
                else answer.read()
            )
        statuses[answer.status_code] += 1
        assert answer.status_code < 500 or answer.status_code == 503, answer
        stack.contract.check(method, path, answer.status_code, answer.headers, text)

    while (spent := time.monotonic() - began) < SECONDS or (spent < 4 * SECONDS and not {*statuses} >= USUAL):
        ask()
    return statuses


def accepted(http: httpx.Client) -> tuple[str, str]:
    """A job, and the order that it fulfils; a worker may be quicker than the answer."""
    while True:
        order = placed(http)
        answer = http.post(f"{order}/fulfil", headers={"Prefer": "wait=0"})
        if answer.status_code == 202:
            return answer.json()["job"]["id"], order


def placed(http: httpx.Client) -> str:
    return http.post("/orders", json={"sku": "tea", "quantity": 1}).headers["location"]
