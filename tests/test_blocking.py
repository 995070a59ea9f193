"""Who holds which table, who waits behind whom, each with its job: as one look sees it, and in the words of `coord`."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from coord.blocking import Backend, TableLock, blocking, tree
from coord.cli import main
from coord.cli.locks import line
from tests.serving import eventually
from tests.shop import waiting_for_locks
from tests.workers import Notes, Office, process

if TYPE_CHECKING:
    from collections.abc import Sequence

    import asyncpg

MODE = "SHARE ROW EXCLUSIVE"


async def looked(office: Office) -> list[Backend]:
    async with office.session_maker() as session:
        return await blocking(session)


async def test_a_blocked_job_stands_beneath_the_job_that_holds_its_table(
    office: Office, notes: Notes, tables: None, observer: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    async with process(office, notes, heartbeat_process=False, COORD_TEST_GRACE="5") as worker:
        first = await office.enqueue("hold_lock", "go")
        await notes.say(first, "locked")
        second = await office.enqueue("hold_lock", "go")
        await notes.say(second, "starts")

        async def seen() -> list[Backend]:
            found = await looked(office)
            return (
                found if [backend.job and backend.job.id for _, backend in tree(found)] == [first.id, second.id] else []
            )

        found = await eventually(seen, within=20)
        (_, holder), (depth, waiter) = tree(found)
        assert depth == 1
        assert TableLock("users", MODE) in holder.holds
        assert (holder.waits_for, holder.blocked_by) == (None, ())
        assert (waiter.waits_for, waiter.blocked_by) == (TableLock("users", MODE), (holder.pid,))
        assert waiter.waiting_seconds is not None
        assert 0 < waiter.waiting_seconds < 60
        for backend, job in ((holder, first), (waiter, second)):
            assert backend.job is not None
            assert (backend.job.task, backend.job.attempt, backend.job.queue) == (job.task, 1, "default")
            assert backend.job.pid == worker.pid

        arguments = ["locks", "--url", office.database_url]
        assert await asyncio.to_thread(main, arguments) == 0
        above, below = capsys.readouterr().out.splitlines()
        assert above.startswith(f"job {first.id} hold_lock, attempt 1 (pid {holder.pid}, worker ")
        assert f"holds users ({MODE})" in above
        assert below.startswith(f"   └─ job {second.id} hold_lock, attempt 1 (pid {waiter.pid}, worker ")
        assert f" s for users ({MODE}) behind pid {holder.pid}" in below
        assert await asyncio.to_thread(main, [*arguments, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [(each["job"]["id"], each["depth"]) for each in told] == [(str(first.id), 0), (str(second.id), 1)]
        notes.let("go")
        await office.final(first)
        await office.final(second)
    assert await looked(office) == []
    assert await asyncio.to_thread(main, arguments) == 0
    assert "nobody" in capsys.readouterr().out


async def test_who_is_no_job_is_told_by_what_he_is(office: Office, tables: None, observer: asyncpg.Connection) -> None:
    """A handler's session behind psql, which has a row: no table's lock, and still in the way."""
    await observer.execute("INSERT INTO users (id, name) VALUES (1, ''); SET application_name = 'psql'")
    transaction = observer.transaction()
    await transaction.start()
    await observer.execute("UPDATE users SET name = 'x' WHERE id = 1")
    async with office.session_maker() as session:
        update = asyncio.create_task(session.execute(text("UPDATE users SET name = 'y' WHERE id = 1")))
        await eventually(lambda: waiting_for_locks(observer, "UPDATE"))
        (_, holder), (depth, waiter) = tree(await looked(office))
        await transaction.rollback()
        await update
    assert (holder.application_name, holder.job, depth) == ("psql", None, 1)
    assert TableLock("users", "ROW EXCLUSIVE") in holder.holds
    assert waiter.waits_for == TableLock(None, "a row of another transaction")
    assert line(holder).startswith(f"pid {holder.pid} (psql) holds users (ROW EXCLUSIVE)")
    assert "for a row of another transaction behind pid" in line(waiter)


async def test_weak_locks_that_nobody_waits_for_are_not_told_of(
    office: Office, tables: None, observer: asyncpg.Connection
) -> None:
    async with observer.transaction():
        await observer.execute("SELECT * FROM users")
        await observer.execute("LOCK TABLE users IN ROW EXCLUSIVE MODE")
        assert await looked(office) == []
        await observer.execute("LOCK TABLE users IN SHARE MODE")
        (found,) = await looked(office)
        assert TableLock("users", "SHARE") in found.holds


def backend(pid: int, *blocked_by: int) -> Backend:
    return Backend(
        pid=pid, application_name="", state=None, query="", transaction_seconds=None, holds=(), waits_for=None,
        waiting_seconds=None, blocked_by=blocked_by, job=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        ([backend(1), backend(2, 1), backend(3, 2, 1), backend(4, 1)], [(0, 1), (1, 2), (2, 3), (1, 4)]),
        ([backend(1, 2), backend(2, 1)], [(0, 1), (1, 2)]),
        ([backend(2, 9)], [(0, 2)]),
        ([backend(1, 1)], [(0, 1)]),
    ],
    ids=["a tree", "a deadlock", "who is gone already", "itself"],
)
def test_each_backend_is_in_the_tree_once(backends: Sequence[Backend], expected: list[tuple[int, int]]) -> None:
    assert [(depth, found.pid) for depth, found in tree(backends)] == expected
