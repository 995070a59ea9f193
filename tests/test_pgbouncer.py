"""Everything through PgBouncer in transaction mode, as docs/pgbouncer.md says: API, workers, locks, waits, a rescue."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Integer, cast, func, make_url, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker

import tests.pooler
from coord import Coordinator, LockTimeoutError, advisory_lock, enqueue, job_transaction, lock_tables
from coord import wait_for_row_change as wait
from tests.matrix.environment import NotToBeRun
from tests.matrix.servers import PgBouncer
from tests.models import Item, User
from tests.pages import blocks
from tests.shop import ROOT
from tests.workers import Notes, Office, process, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncSession

pytestmark = [pytest.mark.usefixtures("tables"), pytest.mark.slow]

PAGE = ROOT / "docs" / "pgbouncer.md"
SERVER_CONNECTIONS = 6
"""Fewer than the clients ask for at once."""


class Small(PgBouncer):
    def _command(self, port: int) -> Any:
        program, file = super()._command(port)
        settings = Path(file)
        few = f"default_pool_size = {SERVER_CONNECTIONS}"
        settings.write_text(settings.read_text().replace("default_pool_size = 20", few))
        return [program, file]


@pytest.fixture(scope="module")
def pooler(database_url: str) -> Iterator[PgBouncer]:
    port = make_url(database_url).port
    assert port is not None
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as directory:
        os.chmod(directory, 0o755)  # noqa: PTH101 - it runs as another user
        try:
            made = Small(Path(directory) / "pgbouncer", port)
        except NotToBeRun as reason:
            pytest.skip(str(reason))
        with made:
            yield made


@pytest.fixture
async def pooled(
    office: Office, pooler: PgBouncer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """Sessions through it, and what it takes for the worker's process to go through it as well."""
    monkeypatch.setenv("COORD_TEST_POOLER", f"unnamed {pooler.port}")
    engine = tests.pooler.create_engine(office.database_url, pool_size=20)
    yield async_sessionmaker(engine, expire_on_commit=False)
    await engine.dispose()


def test_the_engine_of_the_tests_is_the_pages() -> None:
    (block, *_) = blocks(PAGE, "python")
    assert f"connect_args={tests.pooler.WAYS['unnamed']}".replace("'", '"') in block.text


async def test_a_request_waits_for_its_job_through_it(office: Office, pooled: async_sessionmaker[AsyncSession]) -> None:
    async def name(ctx: dict[str, Any], user_id: int) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [User]):
            last = await session.scalar(select(func.max(cast(User.name, Integer))))
            (await session.get_one(User, user_id)).name = str((last or 0) + 1)

    async def asked(user_id: int) -> str:
        async with pooled() as session:
            session.add(User(id=user_id, name="0"))
            job = await enqueue(session, name, user_id)
            await session.commit()
            user = await wait(session, User, user_id, columns=["name"], timeout=30, job=job)
            return user.name

    through: dict[str, Any] = {"session_maker": pooled, "max_jobs": 10}
    async with (
        Coordinator(pooled, redis=office.redis_url, read_settings={}),
        working(office, [name], **through) as worker,
    ):
        names = await asyncio.gather(*map(asked, range(1, 31)))
        assert worker.lives
    assert sorted(map(int, names)) == [*range(1, 31)]


async def test_locks_end_with_their_transaction_and_leave_no_setting_behind(
    pooled: async_sessionmaker[AsyncSession],
) -> None:
    usual = text("SELECT current_setting('lock_timeout')")
    for _ in range(2 * SERVER_CONNECTIONS):
        async with pooled() as session, lock_tables(session, [User, Item], timeout=3):
            async with pooled() as other, advisory_lock(other, "nightly", timeout=3):
                with pytest.raises(LockTimeoutError):
                    async with lock_tables(other, [User], timeout="20ms"):
                        raise AssertionError
        async with pooled() as session:
            assert await session.scalar(usual) == "0"


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_worker_that_is_gone_frees_its_locks_through_it(
    office: Office, notes: Notes, pooled: async_sessionmaker[AsyncSession], fault: signal.Signals
) -> None:
    """The transaction is the pooler's connection to the server by then, which the rescue ends."""
    async with process(office, notes) as worker:
        job = await office.enqueue("hold_lock", "go")
        await notes.say(job, "locked")
        async with process(office, notes):
            worker.signal(fault)
            notes.let("go")
            row = await office.final(job, within=20)
            assert (row.state, row.attempt) == ("done", 2)
            assert await office.effects(job) == [2]
    async with pooled() as session, lock_tables(session, [User], timeout=0):
        """Free."""
