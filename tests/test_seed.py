"""The seed's snippets run as they are written there, with the import taken from `coord` and the dots filled in."""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.models import Item, Reserved, User
from tests.serving import eventually, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection

pytestmark = pytest.mark.usefixtures("tables")

SESSION_DEPENDENCY = """
from sqlalchemy.ext.asyncio import create_async_engine, async_sessionmaker
from coord import create_db_dependency

engine = create_async_engine(url="postgresql+asyncpg://...", future=True)
session_maker = async_sessionmaker(bind=engine, expire_on_commit=False)
get_db = create_db_dependency(session_maker=session_maker)

@router.get("/users")
async def list_users(session: AsyncSession = Depends(get_db)):
    ...
"""

SESSION_CONTEXT = """
from coord import create_db_context

db_context = create_db_context(session_maker=session_maker)

async def seed():
    async with db_context() as session:
        ...
"""

NESTED_TRANSACTIONS = """
from coord import get_transaction

async def create_user_with_role(session=session):
    async with get_transaction(session=session):
        ...
        async with get_transaction(session=session): # uses savepoint
            ...
"""

TABLE_LOCKING = """
from coord import lock_tables

async with lock_tables(session=session, tables=[User], mode="EXCLUSIVE"):
    # No other transaction can modify User until this block exits
    ...
"""

ROW_CHANGE_POLLING = """
from coord import wait_for_row_change

# Wait up to 30s for order.status to change
await wait_for_row_change(
    session=session,
    model=Order,
    pk_value=order_id,
    columns=[Order.status],
    interval=1.0,
    timeout=30.0,
)
"""

SNIPPETS = [SESSION_DEPENDENCY, SESSION_CONTEXT, NESTED_TRANSACTIONS, TABLE_LOCKING, ROW_CHANGE_POLLING]

LOOKED = """SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND state = 'idle' AND query LIKE 'SELECT 1, %'"""

Namespace = dict[str, Any]


async def run(snippet: str, namespace: Namespace, *bodies: str) -> None:
    """Run the snippet, each of its `...` replaced by a body, in turn."""
    for body in bodies:
        before, _, after = snippet.partition("...\n")
        indent = before[before.rindex("\n") + 1 :]
        snippet = before.removesuffix(indent) + textwrap.indent(body, indent) + "\n" + after
    code = compile(snippet, "seed", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    running = eval(code, namespace)
    if inspect.iscoroutine(running):
        await running


@pytest.fixture
async def namespace(database_url: str) -> AsyncIterator[Namespace]:
    """What the first snippet has defined, on the tests' database, and an open session."""
    namespace: Namespace = {"router": APIRouter(), "AsyncSession": AsyncSession, "Depends": Depends}
    namespace |= {"User": User, "Item": Item, "Order": Reserved, "select": select}
    await run(
        SESSION_DEPENDENCY.replace("postgresql+asyncpg://...", database_url),
        namespace,
        "session.add(User(id=1, name='listed'))\nreturn list(await session.scalars(select(User.name)))",
    )
    engine: AsyncEngine = namespace["engine"]
    async with namespace["session_maker"]() as session:
        yield namespace | {"session": session}
    await engine.dispose()


async def test_the_snippets_run_as_they_are(namespace: Namespace, observer: Connection) -> None:
    await observer.execute("""INSERT INTO "Other Shop"."order" VALUES (7, 'pending')""")
    order = await namespace["session"].get(Reserved, 7)
    await namespace["session"].commit()
    await observer.execute("""UPDATE "Other Shop"."order" SET status = 'fulfilled'""")
    for snippet in SNIPPETS:
        await run(snippet, namespace | {"router": APIRouter(), "order_id": 7})
    assert order.status == "fulfilled"


async def test_the_route_commits_before_its_answer(namespace: Namespace, observer: Connection) -> None:
    app = FastAPI()
    app.include_router(namespace["router"])
    async with served(app) as client, client.stream("GET", "/users") as response:
        assert response.status_code == 200
        assert await observer.fetchval("SELECT name FROM users WHERE id = 1") == "listed"
        assert await response.aread() == b'["listed"]'


async def test_the_context_commits_what_the_task_has_done(namespace: Namespace, observer: Connection) -> None:
    await run(SESSION_CONTEXT, namespace, "session.add(User(id=2, name='seeded'))")
    await namespace["seed"]()
    assert await observer.fetchval("SELECT name FROM users WHERE id = 2") == "seeded"


@pytest.mark.parametrize(("role", "committed"), [("session.add(Item(id=4))", 1), ("raise KeyError", 0)])
async def test_the_inner_transaction_is_a_savepoint_of_the_outer(
    namespace: Namespace, observer: Connection, role: str, committed: int
) -> None:
    await run(NESTED_TRANSACTIONS, namespace, "session.add(User(id=3))", role)
    if committed:
        await namespace["create_user_with_role"]()
    else:
        with pytest.raises(KeyError):
            await namespace["create_user_with_role"]()
    assert await observer.fetchval("SELECT count(*) FROM users") == committed
    assert await observer.fetchval("SELECT count(*) FROM items") == committed


async def test_nobody_modifies_the_table_until_the_block_exits(namespace: Namespace, observer: Connection) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()
    namespace |= {"entered": entered, "leave": leave}
    locking = asyncio.create_task(run(TABLE_LOCKING, namespace, "entered.set()\nawait leave.wait()"))
    await entered.wait()
    writing = asyncio.create_task(observer.execute("INSERT INTO users VALUES (5, '')"))

    async def writer_waits() -> bool:
        statement = select(func.count()).select_from(text("pg_locks")).where(text("NOT granted"))
        async with namespace["engine"].connect() as connection:
            return bool(await connection.scalar(statement))

    await eventually(writer_waits)
    assert not writing.done()
    leave.set()
    await locking
    await writing


async def test_the_wait_is_answered_by_a_change(namespace: Namespace, observer: Connection) -> None:
    """After its first look, so that a look at the beat of the interval is what finds it."""
    await observer.execute("""INSERT INTO "Other Shop"."order" VALUES (7, 'pending')""")
    session: AsyncSession = namespace["session"]
    order = await session.get_one(Reserved, 7)
    waiting = asyncio.create_task(run(ROW_CHANGE_POLLING, namespace | {"order_id": 7}))

    async def looked() -> bool:
        return bool(await observer.fetchval(LOOKED))

    await eventually(looked)
    await observer.execute("""UPDATE "Other Shop"."order" SET status = 'fulfilled'""")
    async with asyncio.timeout(5):
        await waiting
    assert order.status == "fulfilled"
