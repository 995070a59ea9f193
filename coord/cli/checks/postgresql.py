"""The server: can it keep what coord promises, and are there connections enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from coord.cli.checks.finding import Finding, Setup
from coord.database.engine import engine_of
from coord.worker.config import SPARE_CONNECTIONS
from coord.worker.state import MAX_CONNECTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coord.worker.config import WorkerConfig

OLDEST = 140_000
OWN_CONNECTIONS = MAX_CONNECTIONS + 2
"""Of a worker, beside its pool: for maintenance, a rescue and the heartbeat."""
CROWDED = 0.9
_SERVER = text("""
    SELECT current_setting('server_version_num')::int AS version, current_setting('server_version') AS spelled,
        pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool AS read_only,
        current_setting('default_transaction_isolation') AS isolation,
        current_setting('fsync')::bool AS fsync, current_setting('synchronous_commit') AS synchronous,
        current_setting('autovacuum')::bool AS autovacuum, current_setting('server_encoding') AS encoding,
        current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int AS room,
        (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS used
""")


async def server(setup: Setup) -> AsyncIterator[Finding]:
    async with setup.engine.connect() as connection:
        found = (await connection.execute(_SERVER)).one()
    if found.version < OLDEST:
        yield Finding("version", f"PostgreSQL is {found.spelled}", "upgrade to 14 or newer")
    if found.read_only:
        yield Finding("read only", "PostgreSQL takes no writes: a standby, or set so", "name the primary in the URL")
    if not found.fsync or found.synchronous == "off":
        which = "synchronous_commit" if found.fsync else "fsync"
        what = f"{which} is off: a commit that was answered may be lost"
        yield Finding("durability", what, f"{which} = on, unless this is a test")
    if not found.autovacuum:
        yield Finding("bloat", "autovacuum is off, and the ledger changes all the time", "autovacuum = on")
    if found.encoding != "UTF8":
        what = f"the database's encoding is {found.encoding}: errors that it cannot store are escaped"
        yield Finding("encoding", what, "make the database with ENCODING 'UTF8'")
    if setup.worker is None and found.isolation != "read committed":
        yield _isolation(found.isolation)
    if found.used >= CROWDED * found.room:
        what = f"{found.used} of {found.room} connections are in use"
        yield Finding("connections", what, "raise max_connections, or make the pools smaller")
    if setup.worker is not None:
        async for finding in _pool(setup.worker, found.room):
            yield finding


def _isolation(level: str) -> Finding:
    what = f"transactions are {level.lower()}: what a lock's last holder committed may be unseen, and commits may fail"
    return Finding("isolation", what, 'create_async_engine(…, isolation_level="READ COMMITTED")')


async def _pool(worker: WorkerConfig, room: int) -> AsyncIterator[Finding]:
    """Of the engine that the worker's settings have."""
    engine = engine_of(worker.session_maker)
    async with engine.connect() as connection:
        level = await connection.get_isolation_level()
    if level != "READ COMMITTED":
        yield _isolation(level)
    pool: Any = engine.pool
    if not isinstance(pool, QueuePool) or pool.size() == 0:
        return
    if pool.size() < worker.max_jobs:
        what = f"the pool keeps {pool.size()} connections for {worker.max_jobs} jobs at a time"
        yield Finding("pool", what, f"pool_size={worker.max_jobs + SPARE_CONNECTIONS}, or fewer max_jobs")
    if pool.size() + OWN_CONNECTIONS > room:
        what = f"one worker opens {pool.size() + OWN_CONNECTIONS} connections, and PostgreSQL has room for {room}"
        yield Finding("connections", what, "raise max_connections, or make the pool smaller")
