"""The pages say what the code does: every example runs, every name and number in them is the code's."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import subprocess
import sys
import tokenize
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import select

import coord
import coord.cli
from coord import Job, JobState, LockMode, enqueue, lock_tables, wait_for_row_change
from coord.database.engine import CONNECTION_CHECK
from coord.waiting.watcher import MAX_WAITERS
from tests import warm
from tests.pages import BLOCK, DOCS, FILE, Namespace, blocks, examples, prose, run
from tests.project import Dev
from tests.serving import eventually, served
from tests.shop import ROOT, emptied
from worker.environment import (
    ADMIN_TOKEN,
    CONSOLE_READ_TOKEN,
    CONSOLE_TOKEN,
    DATABASE,
    DEFAULT_DATABASE_URL,
    DEFAULT_REDIS_URL,
    METRICS_HOST,
    METRICS_PORT,
    REDIS,
)
from worker.models import Order, OrderStatus, Stock

README = ROOT / "README.md"
SUITE = {"COORD_TEST_DATABASE_URL", "COORD_TEST_REDIS_URL"}
"""Where users' tests find servers."""
PAGES = [README, *DOCS]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
FOR_WHO_CARRIES_ON = [CONTRIBUTING, *DECISIONS]


RUN_ELSEWHERE = {"sessions", "errors", "recipes", "partners", "waiting", "http", "security"}
"""Pages whose examples run in tests that look at what comes of them, below and in tests/test_http_documentation.py."""


@pytest.mark.parametrize(
    "page", [page for page in DOCS if examples(page) and page.stem not in RUN_ELSEWHERE], ids=lambda page: page.stem
)
async def test_every_example_of_a_page_runs(page: Path, namespace: Namespace) -> None:
    await run(page, namespace)


async def test_the_sessions_page_says_what_is_committed(namespace: Namespace) -> None:
    await run(ROOT / "docs" / "sessions.md", namespace)
    statuses = {"orders": 201, "raised": 409, "returned": 409, "swallowed": 500, "contained": 200, "stocked": 200}
    async with served(namespace["app"]) as client:
        answers = {path: await client.post(f"/{path}") for path in statuses}
    assert {path: answer.status_code for path, answer in answers.items()} == statuses
    async with namespace["session_maker"]() as session:
        assert await session.get(Order, answers["orders"].json()) is not None
        skus = set(await session.scalars(select(Order.sku)))
        assert skus == {"tea", "returned", "contained"}
        assert set(await session.scalars(select(Stock.sku))) == {"tea", "cocoa", "after the handler"}


async def test_a_dependency_without_the_scope_loses_its_writes_as_the_page_says(namespace: Namespace) -> None:
    await run(ROOT / "docs" / "sessions.md", namespace)
    app: FastAPI = namespace["app"]
    stocked = namespace["stocked"]

    @app.post("/in-vain")
    async def in_vain(_: None = Depends(stocked)) -> None: ...

    async with served(app) as client:
        assert (await client.post("/in-vain")).status_code == 200
    async with namespace["session_maker"]() as session:
        assert await session.get(Stock, "after the handler") is None


async def test_the_retries_of_the_errors_page_take_stock(namespace: Namespace) -> None:
    await run(ROOT / "docs" / "errors.md", namespace)
    async with namespace["session_maker"]() as session:
        assert (await session.get_one(Stock, "tea")).quantity == 97


async def all_ended(namespace: Namespace) -> Counter[str]:
    """How many jobs each task has had, once none is queued."""

    async def none_queued() -> bool:
        async with namespace["session_maker"]() as session:
            return await session.scalar(select(Job.id).where(Job.state == JobState.QUEUED)) is None

    await eventually(none_queued, within=20)
    async with namespace["session_maker"]() as session:
        return Counter(await session.scalars(select(Job.task)))


async def test_the_recipes_make_each_next_step_once(namespace: Namespace) -> None:
    await run(ROOT / "docs" / "recipes.md", namespace)
    steps = await all_ended(namespace)
    assert steps == dict.fromkeys(("pack", "send", "weigh_all", "report"), 1) | {"weigh": 3}
    async with namespace["session_maker"]() as session:
        assert {*await session.scalars(select(namespace["Parcel"].status))} == {"weighed"}
        assert [*await session.scalars(select(namespace["Letter"].text))] == ["batch 1 is weighed"]


async def test_what_partners_are_told_is_told_once(namespace: Namespace) -> None:
    await run(ROOT / "docs" / "partners.md", namespace)
    assert await all_ended(namespace) == dict.fromkeys(("call_partner", "announce", "deliver"), 1)
    assert [*namespace["sent"].values()] == ["parcel 2 is on its way"]
    async with namespace["session_maker"]() as session:
        assert [*await session.scalars(select(namespace["Usage"].calls))] == [1]
        assert [*await session.scalars(select(namespace["Letter"].id))] == []


async def test_the_worker_of_the_scaling_page_serves_the_queue_that_is_enqueued_to(namespace: Namespace) -> None:
    await run(ROOT / "docs" / "scaling.md", namespace)
    assert namespace["Settings"].worker_config().keys.queue == namespace["job"].queue == "warehouse north"


async def test_the_coordinator_of_the_waiting_page_wakes_a_wait(namespace: Namespace) -> None:
    await run(ROOT / "docs" / "waiting.md", namespace)
    order_id = namespace["order_id"]
    looked = asyncio.Event()

    def fulfilled(order: Order) -> bool:
        looked.set()
        return order.status is OrderStatus.FULFILLED

    async with served(namespace["app"]), namespace["session_maker"]() as session:
        waiting = asyncio.create_task(
            wait_for_row_change(session, Order, order_id, until=fulfilled, interval=60, timeout=10)
        )
        await looked.wait()
        async with namespace["session_maker"]() as enqueuing:
            await enqueue(enqueuing, namespace["fulfil_order"], order_id)
            await enqueuing.commit()
        async with asyncio.timeout(5):
            await waiting


async def test_the_project_in_the_readme_answers_with_the_workers_result(
    tmp_path: Path, database: str, redis_url: str
) -> None:
    files = {match[1]: block.text for block in blocks(README, "python") if (match := FILE.match(block.text))}
    assert len(files) == len(blocks(README, "python"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    await emptied(redis_url)
    async with AsyncExitStack() as stack:
        dev = Dev(tmp_path, "--workers", "2", **{DATABASE: database, REDIS: redis_url})
        stack.callback(dev.status)
        stack.callback(dev.process.send_signal, signal.SIGTERM)
        await asyncio.to_thread(dev.ready)
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{dev.port}", timeout=30))
        answers = await asyncio.gather(*(client.post("/orders") for _ in range(20)))
    orders = [answer.raise_for_status().json() for answer in answers]
    assert {order["status"] for order in orders} == {"fulfilled"}
    assert sorted(order["invoice_number"] for order in orders) == list(range(1, 21))


def test_the_tests_on_the_testing_page_pass_for_the_project_in_the_readme(
    tmp_path: Path, database_url: str, redis_url: str
) -> None:
    for page in (README, ROOT / "docs" / "testing.md"):
        for block in blocks(page, "python"):
            match = FILE.match(block.text)
            assert match, "every example is a file"
            (tmp_path / match[1]).write_text(block.text)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\nasyncio_mode = auto\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("COORD_", "PYTEST_"))}
    servers = {"COORD_TEST_DATABASE_URL": database_url, "COORD_TEST_REDIS_URL": redis_url}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "-W", "error"]
    ended = subprocess.run(
        command, check=False, cwd=tmp_path, env={**clean, **servers}, capture_output=True, text=True, timeout=100
    )
    assert re.search(r"^3 passed", ended.stdout, re.MULTILINE), ended.stdout


@pytest.mark.parametrize("page", [*PAGES, *FOR_WHO_CARRIES_ON], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[^)]*)\)", README.read_text()))
    assert linked == {f"docs/{page.name}" for page in DOCS} | {"docs/decisions/README.md"}
    listed = set(re.findall(r"\]\((\d[^)]*)\)", (ROOT / "docs" / "decisions" / "README.md").read_text()))
    assert listed == {page.name for page in DECISIONS} - {"README.md"}


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_every_make_target_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), target


def test_every_option_of_coord_dev_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert coord.cli.main(["dev", "--help"]) == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    text = "".join(page.read_text() for page in PAGES)
    section = re.search(r"^## coord dev\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^coord dev .*$", text, re.MULTILINE)
    assert section is not None
    named = set(re.findall(r"--[a-z-]+", section[1] + "".join(commands)))
    assert named == known - {"--help"}


def test_the_variables_and_their_defaults_are_those_of_the_shop() -> None:
    text = (ROOT / "docs" / "operation.md").read_text()
    assert f"| `{DATABASE}` | `{DEFAULT_DATABASE_URL}` |" in text
    assert f"| `{REDIS}` | `{DEFAULT_REDIS_URL}` |" in text
    named = {name for page in PAGES for name in re.findall(r"COORD_[A-Z_]+", page.read_text())}
    assert named == {
        DATABASE,
        REDIS,
        ADMIN_TOKEN,
        CONSOLE_TOKEN,
        CONSOLE_READ_TOKEN,
        METRICS_HOST,
        METRICS_PORT,
        "COORD_DEVELOPMENT",
        *SUITE,
    }


def startups() -> list[tuple[str, str]]:
    console = "".join(block.text for block in blocks(ROOT / "docs" / "operation.md", "console"))
    return re.findall(r"^\$ (.*)\n(.*)\n", console, re.MULTILINE)


@pytest.mark.parametrize(("command", "line"), startups())
async def test_a_start_that_fails_says_the_line_on_the_page(command: str, line: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("COORD_")}
    variables, program = re.fullmatch(r"((?:\w+=\S+ )*)(.+)", command).groups()  # type: ignore[union-attr]
    given = dict(variable.split("=", 1) for variable in variables.split())
    status, _, error = await warm.ended(*program.split(), env={**clean, **given})
    assert status != 0
    assert error == f"{line}\n"


def test_every_error_is_on_the_errors_page() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    public = {name: found for name in coord.__all__ if inspect.isclass(found := getattr(coord, name))}
    errors = {name: error for name, error in public.items() if issubclass(error, coord.CoordError)}
    for name in errors:
        assert f"`{name}`" in text
    for name, also, retryable, _ in rows:
        assert errors[name].retryable == (retryable == "yes")
        assert also in {"", *(base.__name__ for base in errors[name].__mro__)}


def test_every_mode_on_the_locks_page_exists() -> None:
    for mode in re.findall(r"`\"?([A-Z]+(?:[ _][A-Z]+)+)\"?`", (ROOT / "docs" / "locks.md").read_text()):
        assert mode in {*LockMode, *LockMode.__members__, "SELECT FOR UPDATE"}


def default(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize(
    ("page", "says", "value", "expected"),
    [
        ("locks", "one deadline for the whole call, 5 s unless given", default(lock_tables, "timeout"), 5.0),
        ("locks", "The default mode, `SHARE ROW EXCLUSIVE`", default(lock_tables, "mode"), "SHARE ROW EXCLUSIVE"),
        ("waiting", "within `interval`, 0.5 s unless given", default(wait_for_row_change, "interval"), 0.5),
        ("waiting", "`timeout` has passed, 30 s unless given", default(wait_for_row_change, "timeout"), 30.0),
        ("waiting", "A process that has 20,000 waits open refuses one more", MAX_WAITERS, 20_000),
        ("sessions", "sets `client_connection_check_interval` to 250 ms", CONNECTION_CHECK, "250ms"),
        ("operation", "sets `client_connection_check_interval` to 250 ms", CONNECTION_CHECK, "250ms"),
    ],
)
def test_a_number_on_a_page_is_the_codes(page: str, says: str, value: object, expected: object) -> None:
    assert says in prose(ROOT / "docs" / f"{page}.md")
    assert value == expected


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_is_read_in_five_minutes(page: Path) -> None:
    prose, *_ = page.read_text().split("<!-- what follows is written by")
    typed = page.stem in ("tutorial", "proof")  # files that are typed and not read
    pictures = [match[0] for match in BLOCK.finditer(prose) if match[1] == "text" or typed]
    assert len(prose.splitlines()) - sum(len(picture.splitlines()) for picture in pictures) <= 125


NAMED_FILE = re.compile(r"\b(?:coord|worker|api|tests|benchmarks)/[\w/]+(?:\.\w+|/)")


@pytest.mark.parametrize("page", [CONTRIBUTING, *(page for page in DOCS if page.stem.startswith("architecture"))])
def test_every_file_that_is_named_is_there(page: Path) -> None:
    assert [name for name in NAMED_FILE.findall(page.read_text()) if not (ROOT / name).exists()] == []


def test_each_flow_goes_through_ten_files_at_most() -> None:
    pages = [page for page in DOCS if page.stem.startswith("architecture")]
    flows = [block.text for page in pages for block in blocks(page, "text")]
    assert len(flows) >= 4
    for flow in flows:
        assert 0 < len(set(NAMED_FILE.findall(flow))) <= 10


def names_in_the_code() -> str:
    """Names of the package and of the benchmarks, in lower case with an underscore before each of their words."""
    paths = [path for package in ("coord", "benchmarks") for path in (ROOT / package).rglob("*.py")]
    names = set()
    for path in paths:
        with path.open("rb") as source:
            names |= {token.string for token in tokenize.tokenize(source.readline) if token.type == tokenize.NAME}
    return " ".join("_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().lstrip("_") for name in sorted(names))


def test_every_word_of_the_glossary_is_in_the_code() -> None:
    lines = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("- ")]
    words = [line.split("**")[1] for line in lines]
    assert words == sorted(words)
    assert all(re.fullmatch(r"- \*\*[a-z ]+\*\*: [^.]+\.", line) for line in lines), "one line, one sentence"
    names = names_in_the_code()
    assert [word for word in words if "_" + word.replace(" ", "_") not in names] == []


def test_the_variables_of_the_suite_are_those_of_its_fixtures() -> None:
    said = set(re.findall(r"COORD_TEST_[A-Z_]+", CONTRIBUTING.read_text()))
    assert said == set(re.findall(r"COORD_TEST_[A-Z_]+", (ROOT / "tests" / "conftest.py").read_text()))


def test_the_changelog_has_what_is_unreleased_by_kind() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    unreleased = text.split("## Unreleased\n")[1].split("\n## ")[0]
    assert re.findall(r"^### (.*)$", unreleased, re.MULTILINE) == ["Added", "Changed", "Fixed"]
