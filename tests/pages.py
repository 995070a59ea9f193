"""The pages as the tests read them, and the examples on them as they are run.

A Python block whose first line is a comment with a file's name is that file of the page's project. The others of a page
run in order in one namespace, where `await` is allowed. They are given the shop's `Order` and `Stock`, `session_maker`,
`database_url`, `redis_url`, and the task `fulfil_order`, which a worker runs; and each for itself a new `session` and a
pending order, `order_id`, that nobody has looked at.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import create_ledger, job_transaction, lock_tables, worker_settings
from coord.testing import run_worker
from tests.pooler import UNTOLD
from tests.serving import engine_at
from tests.shop import ROOT, emptied, empty_database
from worker.models import Base, Order, OrderStatus, Stock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

DOCS = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\w+\.py)\n")
TASKS = re.compile(r"^tasks = ", re.MULTILINE)
"""In a page whose worker runs these, from there on, and not `fulfil_order`."""
WORKERS = "workers of the page"

Namespace = dict[str, Any]


class Block(NamedTuple):
    text: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return [Block(match[2], text.count("\n", 0, match.start(2))) for match in found]


def examples(page: Path) -> list[Block]:
    """What runs in the page's namespace."""
    return [block for block in blocks(page, "python") if not FILE.match(block.text)]


def prose(page: Path) -> str:
    """The text as a reader sees it: without its examples, and with its lines run together."""
    return " ".join(BLOCK.sub("", page.read_text()).split())


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[str]:
    async with empty_database(database_url) as url:
        yield url


@pytest.fixture
async def namespace(database: str, redis_url: str) -> AsyncIterator[Namespace]:
    engine = create_async_engine(database, pool_size=5, max_overflow=0)
    async with engine.begin() as connection:
        await create_ledger(connection)
        await connection.run_sync(Base.metadata.create_all)
    session_maker = async_sessionmaker(bind=engine, expire_on_commit=False)
    async with session_maker() as session, session.begin():
        session.add(Stock(sku="tea", quantity=100))
    await emptied(redis_url)
    async with AsyncExitStack() as stack:
        yield {
            "__name__": "page",
            "Order": Order,
            "Stock": Stock,
            "session_maker": session_maker,
            "engine": engine,
            "database_url": database,
            "redis_url": redis_url,
            "fulfil_order": fulfil_order,
            WORKERS: stack,
        }
    await engine.dispose()


async def fulfil_order(ctx: dict[str, Any], order_id: int) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [Order]):
        order = await session.get_one(Order, order_id)
        order.status = OrderStatus.FULFILLED


@asynccontextmanager
async def working(namespace: Namespace, functions: Sequence[Any]) -> AsyncIterator[None]:
    """A worker that runs them, in this event loop."""
    async with engine_at(namespace["database_url"], pool_size=5, **UNTOLD) as engine:
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        async with run_worker(worker_settings(functions, session_maker=sessions, redis=namespace["redis_url"])):
            yield


async def run(page: Path, namespace: Namespace) -> None:
    """All of the page's examples that are no files."""
    session_maker, workers = namespace["session_maker"], namespace[WORKERS]
    has_tasks = any(TASKS.search(block.text) for block in examples(page))
    if not has_tasks and any(fulfil_order.__name__ in block.text for block in examples(page)):
        await workers.enter_async_context(working(namespace, [fulfil_order]))
    for block in examples(page):
        async with session_maker() as session:
            pending = Order(sku="tea", quantity=1)
            session.add(pending)
            await session.commit()
        source = "\n" * block.line + block.text  # so that a traceback names the page's own line
        code = compile(source, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        async with session_maker() as session:
            namespace |= {"session": session, "order_id": pending.id}
            running = eval(code, namespace)
            if inspect.iscoroutine(running):
                async with asyncio.timeout(30):
                    await running
        if TASKS.search(block.text):
            await workers.enter_async_context(working(namespace, namespace["tasks"]))
