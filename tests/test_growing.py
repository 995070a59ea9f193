"""What docs/growing.md says is had beyond one machine: more Redis, an archive of the ledger, waits on a replica."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import (
    Coordinator,
    RowNotFoundError,
    WaitTimeoutError,
    enqueue,
    get_job,
    job_transaction,
    list_jobs,
    lock_tables,
    task_options,
    wait_for_row_change,
)
from coord.dev.embedded import PostgreSQL, Valkey
from coord.jobs.model import jobs
from coord.queue.keys import QueueKeys
from tests.clusters import lay
from tests.faults.test_failover import Replica
from tests.ledger import a_task
from tests.models import User
from tests.pages import blocks
from tests.serving import eventually
from tests.shop import ROOT
from tests.test_pruner import KEPT, aged, pruning
from tests.workers import Office, opened, prepared, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import asyncpg
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

pytestmark = [pytest.mark.slow]

PAGE = ROOT / "docs" / "growing.md"


async def rename(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [User]):
        (await session.get_one(User, user_id)).name = "renamed"


# Several Redis


@pytest.fixture
def other_redis() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as directory:
        with Valkey(Path(directory)) as server:
            yield server.url


async def test_queues_on_two_redis_share_a_ledger(office: Office, other_redis: str) -> None:
    """A job that is enqueued on the wrong side runs all the same, and leaves its message there."""
    north, south = (task_options(a_task, queue=queue) for queue in ("north", "south"))
    async with (
        opened(office.database_url, other_redis) as elsewhere,
        working(office, [a_task], queue="north"),
        working(elsewhere, [a_task], queue="south"),
    ):
        for place, options in ((office, north), (elsewhere, south)):
            assert (await place.final(await place.enqueue(options), within=20)).state == "done"
        strayed = await office.enqueue(south)
        assert (await office.final(strayed, within=20)).state == "done"
        (message,) = await office.redis.zrange(QueueKeys(queue="south").feed, 0, -1)
        assert str(strayed.id) in message.decode()  # as the page says: it stays


# A ledger for years


@pytest.fixture
async def archive(ledger: None, engine: AsyncEngine, observer: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    (block,) = blocks(PAGE, "sql")
    await observer.execute(block.text)
    yield observer
    await observer.execute(
        "DROP TRIGGER archive_jobs ON coord_jobs; DROP FUNCTION archive_jobs; DROP TABLE job_archive"
    )


async def test_what_the_pruner_deletes_is_in_the_archive_by_the_same_commit(
    archive: asyncpg.Connection, engine: AsyncEngine
) -> None:
    age = datetime.now(UTC) - datetime(2026, 11, 15, tzinfo=UTC)
    old = [await aged(engine, max(age, KEPT + timedelta(days=1)), state) for state in ("done", "failed", "cancelled")]
    kept = await aged(engine, timedelta(days=1), "done")
    async with engine.begin() as connection:
        when = datetime(2026, 11, 15, tzinfo=UTC)
        await connection.execute(update(jobs).where(jobs.c.id == old[0]).values(created_at=when, result={"seat": 7}))
    await archive.execute("ALTER TABLE job_archive ADD CHECK (state <> 'cancelled')")
    with pytest.raises(DBAPIError, match="check"):
        await pruning(engine).prune()
    assert await archive.fetchval("SELECT count(*) FROM coord_jobs") == 4
    assert await archive.fetchval("SELECT count(*) FROM job_archive") == 0
    await archive.execute("ALTER TABLE job_archive DROP CONSTRAINT job_archive_state_check")
    assert await pruning(engine).prune() == 3
    assert await archive.fetchval("SELECT array_agg(id) FROM coord_jobs") == [kept]
    assert {row["id"] for row in await archive.fetch("SELECT id FROM job_archive")} == {*old}
    (row,) = await archive.fetch("SELECT id, result FROM job_archive_2026_11 WHERE result IS NOT NULL")
    assert (row["id"], row["result"]) == (old[0], '{"seat":7}')


async def test_the_ledger_cannot_be_partitioned(observer: asyncpg.Connection) -> None:
    """For the two reasons that the page gives."""
    await observer.execute(
        "CREATE TEMP TABLE parted (id uuid PRIMARY KEY, task text, key text) PARTITION BY RANGE (id)"
    )
    with pytest.raises(Exception, match="unique constraint on partitioned table must include all partitioning columns"):
        await observer.execute("CREATE UNIQUE INDEX ON parted (task, key)")
    with pytest.raises(Exception, match="storage parameters"):
        await observer.execute("ALTER TABLE parted SET (autovacuum_vacuum_threshold = 5000)")


# Waits beside replicas


class Beside:
    """A primary with a worker's sessions and a replica of it, each with a coordinator on one Redis."""

    def __init__(self, primary: Office, replica: async_sessionmaker[AsyncSession]) -> None:
        self.primary = primary
        self.replica = replica

    async def replay(self, what: str) -> None:
        """Have the replica `pause` or `resume`."""
        async with self.replica() as session:
            await session.execute(text(f"SELECT pg_wal_replay_{what}()"))

    async def has(self, user_id: int) -> None:
        async def replayed() -> bool:
            async with self.replica() as session:
                return await session.get(User, user_id) is not None

        await eventually(replayed)

    async def change(self, user_id: int, name: str) -> None:
        async with self.primary.session_maker.begin() as session:
            (await session.get_one(User, user_id)).name = name

    async def made(self, user_id: int) -> None:
        async with self.primary.session_maker.begin() as session:
            session.add(User(id=user_id, name="new"))

    async def wait(self, user_id: int, **options: Any) -> str:
        async with self.replica() as session:
            return (await wait_for_row_change(session, User, user_id, columns=["name"], **options)).name


@asynccontextmanager
async def beside(redis_url: str) -> AsyncIterator[Beside]:
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        settings = {"fsync": "off", "max_connections": "80"}
        with PostgreSQL(lay(directory / "primary"), settings=settings) as server:
            async with prepared(server, redis_url) as primary:
                replica = Replica(directory / "replica", server)
                await asyncio.to_thread(replica.start)
                engine = create_async_engine(replica.url, pool_size=5)
                maker = async_sessionmaker(engine, expire_on_commit=False)
                try:
                    async with Coordinator(maker, redis=redis_url):
                        yield Beside(primary, maker)
                finally:
                    await engine.dispose()
                    await asyncio.to_thread(replica.stop, "immediate")


@pytest.fixture
async def replicated(redis_url: str) -> AsyncIterator[Beside]:
    async with beside(redis_url) as found:
        yield found


async def test_a_wait_on_a_replica_is_woken_and_never_told_what_is_not_so(replicated: Beside) -> None:
    await replicated.made(1)
    await replicated.has(1)
    waiting = asyncio.create_task(replicated.wait(1, interval=0.5, timeout=30, since={"name": "new"}))
    await replicated.change(1, "changed")
    assert await waiting == "changed"

    await replicated.replay("pause")
    with pytest.raises(RowNotFoundError):
        await replicated.made(2)
        await replicated.wait(2, timeout=5)
    await replicated.change(1, "later")
    with pytest.raises(WaitTimeoutError):
        await replicated.wait(1, interval=0.1, timeout=1, since={"name": "changed"})
    waiting = asyncio.create_task(replicated.wait(1, interval=0.1, timeout=30, since={"name": "changed"}))
    await replicated.replay("resume")
    assert await waiting == "later"


async def test_a_job_is_waited_for_on_a_replica_and_read_there(replicated: Beside) -> None:
    await replicated.made(1)
    await replicated.has(1)
    async with working(replicated.primary, [rename]):
        job = await replicated.primary.enqueue(rename, 1)

        async def replayed() -> bool:
            async with replicated.replica() as session:
                return await get_job(session, job.id) is not None

        await eventually(replayed)
        assert await replicated.wait(1, timeout=30, since={"name": "new"}, job=job) == "renamed"
        async with replicated.replica() as session:
            assert [report.id for report in await list_jobs(session)] == [job.id]


async def test_what_writes_is_refused_by_a_replica(replicated: Beside) -> None:
    async with replicated.replica() as session:
        with pytest.raises(DBAPIError, match="read-only"):
            await enqueue(session, a_task)
    async with replicated.replica() as session:
        with pytest.raises(DBAPIError, match="during recovery"):
            async with lock_tables(session, [User]):
                raise AssertionError
