"""`coord doctor`: each broken set-up is found and told what to do, and in a sound one there is nothing to find."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, make_url
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import create_ledger, worker_settings
from coord.cli import main
from coord.cli.checks.finding import Setup
from coord.cli.checks.fleet import NEWEST, handed_over
from coord.cli.doctor import findings
from coord.dev.embedded import PostgreSQL, Valkey
from coord.jobs.ids import new_id
from coord.jobs.model import Worker
from tests.clusters import lay
from tests.ledger import a_task, committed
from tests.matrix.environment import NotToBeRun
from tests.matrix.servers import PgBouncer
from tests.serving import engine_at, eventually
from tests.shop import dsn_of, empty_database
from tests.workers import opened, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

import asyncpg
from redis.asyncio import Redis

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """As an application should have them."""
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as directory:
        postgresql = PostgreSQL(lay(Path(directory) / "postgresql"))
        with postgresql, Valkey(Path(directory) / "valkey", persist=True) as valkey:
            yield postgresql.url, valkey.url


@pytest.fixture(scope="module")
async def with_ledger(servers: tuple[str, str]) -> AsyncIterator[str]:
    """A database to be copied."""
    async with empty_database(servers[0]) as url:
        async with engine_at(url) as engine, engine.begin() as connection:
            await create_ledger(connection)
        yield str(make_url(url).database)


class Place:
    """A set-up that is sound, until a test breaks it."""

    def __init__(self, url: str, redis_url: str, sql: asyncpg.Connection, redis: Redis) -> None:
        self.url: str | None = url
        self.redis_url: str | None = redis_url
        self.sql = sql
        self.redis = redis
        self.worker: str | None = None
        self.name = make_url(url).database

    async def checks(self) -> set[str]:
        return {finding.check async for finding in findings(self.url, self.redis_url, self.worker, "coord")}

    async def has_worker(self, *tasks: str) -> None:
        """A heartbeat."""
        row = {"id": new_id(), "queue": "default", "host": "h", "pid": 1, "jobs": {}}
        await self._execute(insert(Worker).values(**row, tasks=dict.fromkeys(tasks, "()")))

    async def enqueue(self) -> None:
        async with engine_at(str(self.url)) as engine:
            await committed(async_sessionmaker(engine))

    async def _execute(self, statement: Any) -> None:
        async with engine_at(str(self.url)) as engine, engine.begin() as connection:
            await connection.execute(statement)


@pytest.fixture
async def place(servers: tuple[str, str], with_ledger: str) -> AsyncIterator[Place]:
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(empty_database(servers[0], with_ledger))
        sql = await asyncpg.connect(dsn_of(url))
        stack.push_async_callback(sql.close)
        redis: Any = Redis.from_url(servers[1])
        stack.push_async_callback(redis.aclose)
        await redis.flushdb()
        yield Place(url, servers[1], sql, redis)
        await redis.config_set("appendonly", "yes")
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", "0")
        await sql.execute("ALTER SYSTEM RESET autovacuum")
        await sql.execute("SELECT pg_reload_conf()")


@pytest.fixture
def settings(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def named(max_jobs: int = 5, **engine: Any) -> None:
        maker = async_sessionmaker(create_async_engine(str(place.url), **{"pool_size": 7, **engine}))
        made = worker_settings([a_task], session_maker=maker, redis=str(place.redis_url), max_jobs=max_jobs)
        monkeypatch.setitem(sys.modules, "doctored", types.SimpleNamespace(Settings=made))
        place.worker = "doctored.Settings"

    return named


async def test_a_ledger_in_a_schema_of_its_own_is_found_and_looked_at(place: Place) -> None:
    await place.sql.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    async with engine_at(str(place.url)) as engine, engine.begin() as connection:
        await create_ledger(connection, schema="the jobs")
    await place.sql.execute(f"ALTER DATABASE {place.name} SET search_path = 'the jobs', public")
    await place.has_worker("another_task")
    await place.sql.execute(f"ALTER DATABASE {place.name} RESET search_path")
    await place.enqueue()
    assert await place.checks() == {"tasks"}
    await place.sql.execute('DROP INDEX "the jobs".coord_jobs_due')
    assert await place.checks() == {"tasks", "indexes"}
    async with engine_at(str(place.url)) as engine, engine.begin() as connection:
        await create_ledger(connection, schema="others")
    assert await place.checks() == {"ledger"}, "nobody says which"


async def test_in_a_sound_set_up_nothing_is_found(place: Place, settings: Callable[..., None]) -> None:
    settings()
    await place.has_worker("a_task")
    await place.enqueue()
    assert await place.checks() == set()


async def sql_setting(place: Place, setting: str) -> None:
    await place.sql.execute(f'ALTER DATABASE "{place.name}" SET {setting}')


async def without_rights(place: Place) -> None:
    role = f"weak_{place.name}"
    await place.sql.execute(f'CREATE ROLE "{role}" LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{role}"')
    place.url = make_url(str(place.url)).set(username=role).render_as_string(hide_password=False)


async def acl(place: Place, *rules: str) -> None:
    await place.redis.acl_setuser("weak", enabled=True, passwords=["+pw"], reset=True)
    await place.redis.execute_command("ACL", "SETUSER", "weak", "~*", "&*", "+@all", *rules)  # type: ignore[no-untyped-call]
    url = make_url(str(place.redis_url)).set(username="weak", password="pw")
    place.redis_url = url.render_as_string(hide_password=False)


async def latin(place: Place) -> None:
    name = f"{place.name}_latin"
    await place.sql.execute(
        f"CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C'"
    )
    place.url = make_url(str(place.url)).set(database=name).render_as_string(hide_password=False)
    async with engine_at(str(place.url)) as engine, engine.begin() as connection:
        await create_ledger(connection)


async def autovacuum_off(place: Place) -> None:
    await place.sql.execute("ALTER SYSTEM SET autovacuum = off")
    await place.sql.execute("SELECT pg_reload_conf()")

    async def is_off() -> bool:
        return bool(await place.sql.fetchval("SHOW autovacuum") == "off")

    await eventually(is_off)


async def paused(place: Place) -> None:
    await place.sql.execute("INSERT INTO coord_queues (name, paused_at) VALUES ('default', now())")


async def unknown_task(place: Place) -> None:
    await place.has_worker("another")
    await place.enqueue()


BROKEN: dict[str, tuple[str, Callable[[Place], Any]]] = {
    "no URL": ("url", lambda place: setattr(place, "url", None)),
    "a malformed URL": ("url", lambda place: setattr(place, "url", "nonsense")),
    "another driver": ("url", lambda place: setattr(place, "url", "postgresql://u:p@127.0.0.1/x")),
    "PostgreSQL is away": ("postgresql", lambda place: setattr(place, "url", "postgresql+asyncpg://u@127.0.0.1:1/x")),
    "no such database": ("postgresql", lambda place: setattr(place, "url", f"{place.url}_not")),
    "Redis is away": ("redis", lambda place: setattr(place, "redis_url", "redis://127.0.0.1:1/0")),
    "no Redis": ("redis", lambda place: setattr(place, "redis_url", None)),
    "a malformed URL of Redis": ("redis", lambda place: setattr(place, "redis_url", "nonsense")),
    "repeatable read": ("isolation", lambda p: sql_setting(p, "default_transaction_isolation = 'repeatable read'")),
    "asynchronous commits": ("durability", lambda place: sql_setting(place, "synchronous_commit = off")),
    "read only": ("read only", lambda place: sql_setting(place, "default_transaction_read_only = on")),
    "no autovacuum": ("bloat", autovacuum_off),
    "LATIN1": ("encoding", latin),
    "Redis keeps nothing": ("persistence", lambda place: place.redis.config_set("appendonly", "no")),
    "Redis evicts": ("eviction", lambda place: place.redis.config_set("maxmemory-policy", "allkeys-lru")),
    "Redis is full": ("redis memory", lambda place: place.redis.config_set("maxmemory", "600000")),
    "no channels": ("redis rights", lambda place: acl(place, "resetchannels")),
    "no scripts": ("redis rights", lambda place: acl(place, "-@scripting")),
    "another's keys": ("redis rights", lambda place: acl(place, "resetkeys", "~other:*")),
    "no INFO": ("redis rights", lambda place: acl(place, "-info")),
    "no ledger": ("ledger", lambda place: place.sql.execute("DROP TABLE coord_schema")),
    "an old ledger": ("ledger", lambda place: place.sql.execute("UPDATE coord_schema SET version = 1")),
    "a newer ledger": ("ledger", lambda place: place.sql.execute("UPDATE coord_schema SET version = 99")),
    "no index": ("indexes", lambda place: place.sql.execute("DROP INDEX coord_jobs_due")),
    "no function": ("function", lambda place: place.sql.execute("DROP FUNCTION coord_lock")),
    "no rights": ("rights", without_rights),
    "paused": ("paused", paused),
    "no worker": ("workers", lambda place: place.enqueue()),
    "an unknown task": ("tasks", unknown_task),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_what_is_broken_is_found(case: str, place: Place) -> None:
    check, damage = BROKEN[case]
    done = damage(place)
    if done is not None:
        await done
    assert await place.checks() >= {check}


async def test_a_ledger_without_its_version_is_said_to_have_none(place: Place) -> None:
    await place.sql.execute("DELETE FROM coord_schema")
    (found,) = [each.what async for each in findings(place.url, place.redis_url, None, "coord")]
    assert found.startswith("its version is not recorded, and this coord knows ")


@pytest.mark.parametrize(
    ("check", "options"),
    [
        ("pool", {"pool_size": 2}),
        ("connections", {"pool_size": 400}),
        ("isolation", {"isolation_level": "SERIALIZABLE"}),
    ],
)
async def test_what_is_broken_in_a_workers_settings_is_found(
    check: str, options: dict[str, Any], place: Place, settings: Callable[..., None]
) -> None:
    settings(**options)
    assert await place.checks() == {check}


async def test_a_workers_connections_beside_its_pool_are_counted(place: Place, settings: Callable[..., None]) -> None:
    reserved = "current_setting('superuser_reserved_connections')::int"
    room = await place.sql.fetchval(f"SELECT current_setting('max_connections')::int - {reserved}")
    settings(pool_size=room - 6)
    assert await place.checks() == set()
    settings(pool_size=room - 5)
    assert await place.checks() == {"connections"}


async def test_a_worker_whose_database_is_another_one_and_away_is_told_in_one_finding(
    place: Place, settings: Callable[..., None]
) -> None:
    url = place.url
    place.url = "postgresql+asyncpg://u:secret@127.0.0.1:1/x"
    settings()
    place.url = url
    found = [each async for each in findings(place.url, place.redis_url, place.worker, "coord")]
    assert [(each.check, "Connect call failed" in each.what) for each in found] == [("server", True)]


def test_a_worker_that_cannot_be_imported_is_told_in_one_line(
    servers: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unset.py").write_text("import os\n\nos.environ['THE_SHOPS_REDIS']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["doctor", "--url", servers[0], "--worker", "unset.Settings"]) == 1
    assert capsys.readouterr().err == "coord: --worker unset.Settings: KeyError: 'THE_SHOPS_REDIS'\n"


class StatementPooling(PgBouncer):
    def _command(self, port: int) -> Any:
        program, file = super()._command(port)
        Path(file).write_text(Path(file).read_text().replace("pool_mode = transaction", "pool_mode = statement"))
        return [program, file]


@pytest.mark.parametrize(("made", "expected"), [(PgBouncer, set()), (StatementPooling, {"pgbouncer"})])
async def test_a_pooler_that_has_no_transactions_is_found(
    made: type[PgBouncer], expected: set[str], place: Place
) -> None:
    port = make_url(str(place.url)).port
    assert port is not None
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as directory:
        os.chmod(directory, 0o755)  # noqa: PTH101 - in an async function; it runs as another user
        try:
            pooler = made(Path(directory) / "pgbouncer", port)
        except NotToBeRun as reason:
            pytest.skip(str(reason))
        with pooler:
            place.url = make_url(str(place.url)).set(port=pooler.port).render_as_string(hide_password=False)
            assert await place.checks() == expected


async def test_a_clock_that_is_wrong_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 60)
    assert await place.checks() == {"clocks"}


async def test_a_process_that_enqueues_without_a_coordinator_is_found(place: Place) -> None:
    assert place.url is not None
    assert place.redis_url is not None
    async with opened(place.url, place.redis_url, coordinated=False) as office, working(office, [a_task]):
        made = [await office.enqueue(a_task) for _ in range(3)]
        for job in made:
            await office.final(job, within=20)
        assert await place.checks() == {"coordinator"}


async def test_that_check_reads_the_newest_jobs_and_not_a_whole_ledger(place: Place) -> None:
    """Of which none has ended within the last hour, so that it would go on looking."""
    old = """INSERT INTO coord_jobs (id, task, queue, arguments, state, finished_at)
        SELECT gen_random_uuid(), 'a_task', 'default', '[[],{}]', 'done', now() - interval '2 hours'
        FROM generate_series(1, 20000)"""
    await place.sql.execute(f"{old}; ANALYZE coord_jobs; SELECT pg_stat_reset()")
    engine = create_async_engine(str(place.url))
    found = handed_over(Setup(engine=engine, schema=None, redis=None, worker=None, namespace="coord"))
    assert [finding async for finding in found] == []
    await engine.dispose()

    async def read() -> int:
        """How many rows, once the session has ended and its figures are there."""
        figures = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_user_tables WHERE relname = 'coord_jobs'"
        return int(await place.sql.fetchval(figures))

    assert 0 < await eventually(read) <= NEWEST


async def test_one_that_has_a_coordinator_is_not(place: Place) -> None:
    assert place.url is not None
    assert place.redis_url is not None
    async with opened(place.url, place.redis_url) as office, working(office, [a_task]):
        for _ in range(3):
            await office.final(await office.enqueue(a_task))
        assert await place.checks() == set()


async def narrow(ctx: Any, seat: int) -> None: ...


async def test_jobs_that_are_put_off_again_and_again_are_found_with_their_task_and_why(place: Place) -> None:
    assert place.url is not None
    assert place.redis_url is not None
    async with opened(place.url, place.redis_url) as office, working(office, [narrow]):
        made = [await office.enqueue("nobodys"), await office.enqueue("narrow"), await office.enqueue("narrow")]

        async def are_put_off() -> bool:
            return all([(await office.row(job)).unknown_seconds > 1 for job in made])

        await eventually(are_put_off)

        async def are_said() -> bool:
            found = {each.what async for each in findings(place.url, place.redis_url, None, "coord")}
            return {f"2 jobs of narrow {again}: {why}", f"1 jobs of nobodys {again}, {nobody}"} == found

        again, nobody = "in the queue default are put off again and again", "since no worker of it knows the task"
        why = "TypeError: the task narrow does not take these arguments here: missing a required argument: 'seat'"
        await eventually(are_said)
        await place.sql.execute("UPDATE coord_jobs SET state = 'cancelled', finished_at = now()")
        assert await place.checks() == set()


async def test_the_command_says_what_to_do_and_its_exit_status_is_for_scripts(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", "--url", str(place.url), "--redis", str(place.redis_url)]
    assert await asyncio.to_thread(main, arguments) == 0
    assert capsys.readouterr().out == "nothing found\n"
    await place.sql.execute("DROP INDEX coord_jobs_due")
    assert await asyncio.to_thread(main, arguments) == 1
    what, do = capsys.readouterr().out.splitlines()
    assert what.startswith("indexes: without coord_jobs_due ")
    assert do == "    CREATE INDEX as `coord schema` prints it: coord_jobs_due"
    assert await asyncio.to_thread(main, [*arguments, "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found.keys() == {"check", "what", "do"}
    url = "postgresql+asyncpg://u:secret@127.0.0.1:1/x"
    assert await asyncio.to_thread(main, ["doctor", "--url", url]) == 1
    assert "secret" not in capsys.readouterr().out
