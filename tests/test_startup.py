"""How the two commands start, wait, and refuse to start: what an operator sees is their stderr and exit status."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import asyncpg
import httpx
import pytest
from sqlalchemy import make_url

from coord.dev.embedded import PostgreSQL, Valkey
from coord.dev.server import free_port
from coord.jobs.model import Ledger
from tests.clusters import lay
from tests.raw import call
from tests.serving import eventually
from tests.shop import (
    API,
    ROOT,
    SERVING,
    WORKER,
    WORKING,
    Network,
    dsn_of,
    emptied,
    empty_database,
    running,
    waiting_for_locks,
)
from worker.models import Base

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DATABASE, REDIS = "COORD_DATABASE_URL", "COORD_REDIS_URL"
SECRET = "s3cret"
COMMANDS = pytest.mark.parametrize("command", [API, WORKER], ids=["api", "worker"])

REFUSED_DATABASES = {
    "not a URL": f"postgres {SECRET}",
    "an empty one": "",
    "a port that is no number": f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:port/shop",
    "another driver": f"postgresql://user:{SECRET}@127.0.0.1/shop",
    "another database": f"mysql+asyncmy://user:{SECRET}@127.0.0.1/shop",
    "nobody there": f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:1/shop",
    "an impossible port": f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:99999/shop",
    "no such host": f"postgresql+asyncpg://user:{SECRET}@nowhere.invalid/shop",
    "an unknown option": f"postgresql+asyncpg://user@127.0.0.1:1/shop?password={SECRET}&sslmode=disable",
}

pytestmark = pytest.mark.slow


async def refused(command: tuple[str, ...], database_url: str, redis_url: str, variable: str) -> str:
    """The one line that the command says before it ends."""
    async with running(command, database_url, redis_url) as process:
        status = await process.exit_status()
    assert len(process.lines) == 1, process.lines
    line = process.lines[0]
    assert status != 0
    assert line.startswith(f"{variable}: ")
    assert SECRET not in line
    return line


@COMMANDS
@pytest.mark.parametrize("url", REFUSED_DATABASES.values(), ids=REFUSED_DATABASES.keys())
async def test_an_unusable_database_url_is_one_line(command: tuple[str, ...], url: str, redis_url: str) -> None:
    await refused(command, url, redis_url, DATABASE)


@COMMANDS
@pytest.mark.parametrize("url", ["", "127.0.0.1:6379", f"http://:{SECRET}@127.0.0.1", f"redis://:{SECRET}@h:port"])
async def test_a_malformed_redis_url_is_one_line(command: tuple[str, ...], url: str, database_url: str) -> None:
    await refused(command, database_url, url, REDIS)


@COMMANDS
async def test_a_database_that_is_not_there_is_named(
    command: tuple[str, ...], database_url: str, redis_url: str
) -> None:
    line = await refused(command, str(make_url(database_url).set(database="no_such_one")), redis_url, DATABASE)
    assert 'database "no_such_one" does not exist' in line


@COMMANDS
async def test_a_wrong_password_is_masked(command: tuple[str, ...], locked_url: str, redis_url: str) -> None:
    line = await refused(command, locked_url, redis_url, DATABASE)
    assert "guest:***@" in line
    assert "password authentication failed" in line


@pytest.fixture(scope="module")
async def locked_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A server that asks for a password, and a URL that has the wrong one."""
    directory: Path = tmp_path_factory.mktemp("locked")
    access = directory / "hba"
    access.write_text("host all postgres 127.0.0.1/32 trust\nhost all guest 127.0.0.1/32 scram-sha-256\n")
    access.chmod(0o644)
    with PostgreSQL(lay(directory / "postgresql"), settings={"hba_file": str(access), "fsync": "off"}) as server:
        connection = await asyncpg.connect(dsn_of(server.url))
        await connection.execute("CREATE ROLE guest LOGIN PASSWORD 'right'")
        await connection.close()
        yield make_url(server.url).set(username="guest", password=SECRET).render_as_string(hide_password=False)


@COMMANDS
@pytest.mark.slow
async def test_a_port_that_is_not_postgresql_is_one_line(command: tuple[str, ...], redis_url: str) -> None:
    port = make_url(redis_url).port
    url = f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:{port}/shop"
    assert "no PostgreSQL answered" in await refused(command, url, redis_url, DATABASE)


async def test_the_api_refuses_its_database_while_redis_is_away_too() -> None:
    """arq's worker asks Redis before it calls anything of ours: it waits for that first, and says so."""
    url = REFUSED_DATABASES["nobody there"]
    await refused(API, url, "redis://127.0.0.1:1/0", DATABASE)


@pytest.mark.slow
async def test_processes_started_together_on_an_empty_database_all_start(database_url: str, redis_url: str) -> None:
    """All four are held up in the middle of it by a table of that name that is never committed."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(empty_database(database_url))
        connection = await asyncpg.connect(dsn_of(url))
        stack.push_async_callback(connection.close)
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("CREATE TABLE stock ()")
        commands = [await stack.enter_async_context(running(command, url, redis_url)) for command in [API, WORKER] * 2]

        async def all_wait() -> bool:
            return await waiting_for_locks(connection) == len(commands)

        await eventually(all_wait, within=20)
        await transaction.rollback()
        for command, started in zip(commands, [SERVING, WORKING] * 2, strict=True):
            await command.says(started)
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert {name for (name,) in tables} == {*Base.metadata.tables, *Ledger.metadata.tables, "coord_schema"}


async def test_a_worker_waits_for_redis_and_says_so_once(database_url: str, tmp_path: Path) -> None:
    redis = Valkey(tmp_path, port=free_port())
    url_of_redis = f"redis://127.0.0.1:{redis.port}/0"
    async with empty_database(database_url) as url, running(WORKER, url, url_of_redis) as worker:
        await worker.says("Redis does not serve arq")
        await asyncio.to_thread(redis.start)
        try:
            await worker.says("Redis serves arq again")
            await worker.says(WORKING)
            assert worker.count("Redis (does not serve|serves) arq") == 2, worker.lines
            assert await worker.stop() == 0
        finally:
            await asyncio.to_thread(redis.stop)


async def test_a_worker_that_waits_for_redis_ends_when_told_to(database_url: str) -> None:
    async with empty_database(database_url) as url, running(WORKER, url, "redis://127.0.0.1:1/0") as worker:
        await worker.says("Redis does not serve arq")
        assert await worker.stop() == 0
    assert worker.count("Traceback") == 0


async def test_a_worker_says_that_a_redis_answers_nothing(database_url: str, silent_port: int) -> None:
    redis_url = f"redis://127.0.0.1:{silent_port}/0"
    async with empty_database(database_url) as url, running(WORKER, url, redis_url) as worker:
        await worker.says("Redis does not serve arq, .*: it has not answered for 2 s")
        assert await worker.stop() == 0
    assert worker.count("Traceback") == 0


async def test_a_worker_that_waits_for_redis_says_that_postgresql_is_away_too() -> None:
    async with running(WORKER, REFUSED_DATABASES["nobody there"], "redis://127.0.0.1:1/0") as worker:
        await worker.says("PostgreSQL is away as well")
        assert worker.count("Redis does not serve arq") == 1
        assert await worker.stop() == 0
    assert worker.count("Traceback") == 0
    assert worker.count("PostgreSQL is away") == 1


@pytest.mark.slow
async def test_without_redis_the_api_takes_orders_and_says_so_once(database_url: str, redis_url: str) -> None:
    """It waits by polling, and a worker that has Redis finds the job in the ledger."""
    await emptied(redis_url)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(empty_database(database_url))
        network = await stack.enter_async_context(Network(redis_url).opened())
        api = await stack.enter_async_context(running(API, url, network.url))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=(await api.says(SERVING))[1], timeout=40))
        placed = await http.post("/orders", json={"sku": "tea", "quantity": 1})
        assert placed.status_code == 201
        fulfil = f"{placed.headers['location']}/fulfil"
        accepted = await http.post(fulfil, headers={"Prefer": "wait=1"})
        assert (accepted.status_code, accepted.json()["job"]["state"]) == (202, "queued")
        assert accepted.elapsed.total_seconds() < 2
        health = await http.get("/healthz")
        assert (health.status_code, health.json()) == (200, {"postgresql": "ok", "redis": "down"})
        await network.visited(2)
        assert api.count("Redis is away") == 1
        await stack.enter_async_context(running(WORKER, url, redis_url))
        assert (await http.post(fulfil)).json()["status"] == "rejected"
        assert (await http.get(accepted.headers["location"])).json()["state"] == "done"
        network.up = True
        await api.says("Redis is back")
        placed = await http.post("/orders", json={"sku": "tea", "quantity": 1})
        assert (await http.post(f"{placed.headers['location']}/fulfil")).json()["status"] == "rejected"
        assert (await http.get("/healthz")).json() == {"postgresql": "ok", "redis": "ok"}
        assert api.count("Redis is away|Redis is back") == 2


@pytest.mark.slow
async def test_a_redis_that_accepts_and_never_answers_holds_no_request(database_url: str, silent_port: int) -> None:
    redis_url = f"redis://127.0.0.1:{silent_port}/0"
    async with empty_database(database_url) as url, running(API, url, redis_url) as api:
        async with httpx.AsyncClient(base_url=(await api.says(SERVING))[1], timeout=40) as http:
            placed = await http.post("/orders", json={"sku": "tea", "quantity": 1})
            fulfil = f"{placed.headers['location']}/fulfil"
            asking = [http.post(fulfil, headers={"Prefer": "wait=1"}) for _ in range(20)]
            answers = await asyncio.gather(*asking, http.get("/healthz"))
    assert [answer.status_code for answer in answers] == [202] * 20 + [200]
    assert len({answer.json()["job"]["id"] for answer in answers[:-1]}) == 1
    assert max(answer.elapsed.total_seconds() for answer in answers) < 4


async def test_an_api_with_open_streams_ends_them_and_itself_when_told_to(database_url: str, redis_url: str) -> None:
    async with empty_database(database_url) as url, running(API, url, redis_url) as api, AsyncExitStack() as stack:
        address = (await api.says(SERVING))[1]
        assert address.startswith("http://127.0.0.1:")  # and nowhere else, unless told to
        async with httpx.AsyncClient(base_url=address) as http:
            placed = await http.post("/orders", json={"sku": "tea", "quantity": 1})
        path = f"{placed.headers['location']}/events"
        streams = [await stack.enter_async_context(call(address, "GET", path)) for _ in range(3)]
        for stream in streams:
            assert (await stream.begun()).status == 200
            assert (await stream.event()) is not None
        stopping = asyncio.create_task(api.stop())
        async with asyncio.timeout(1):
            assert [await stream.event() for stream in streams] == [None] * 3
        async with asyncio.timeout(5):
            assert await stopping in {0, -signal.SIGTERM}  # uvicorn passes the signal on to itself in the end
    assert api.count("Traceback|ERROR") == 0, api.lines


async def test_healthz_fails_only_and_in_time_when_postgresql_does(database_url: str, redis_url: str) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(empty_database(database_url))
        network = await stack.enter_async_context(Network(url).opened())
        network.up = True
        api = await stack.enter_async_context(running(API, network.url, redis_url))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=(await api.says(SERVING))[1], timeout=40))
        assert (await http.get("/healthz")).status_code == 200
        network.cut()
        answer = await http.get("/healthz")
        assert (answer.status_code, answer.json()) == (503, {"postgresql": "down", "redis": "ok"})
        assert answer.elapsed.total_seconds() < 3
        placed = await http.post("/orders", json={"sku": "tea", "quantity": 1})
        assert (placed.status_code, placed.headers["content-type"]) == (503, "application/problem+json")
        network.up = True
        assert (await http.get("/healthz")).json() == {"postgresql": "ok", "redis": "ok"}
        assert (await http.post("/orders", json={"sku": "tea", "quantity": 1})).status_code == 201


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


SHOP_IMPORTED = """
import logging, api, worker
for name in ("uvicorn.error", "arq.worker", "arq.connections"):
    logging.getLogger(name).error("said by %s", name)
"""


async def test_importing_the_shop_connects_to_nothing_and_holds_back_no_log(database_url: str, redis_url: str) -> None:
    async with Network(database_url).opened() as database, Network(redis_url).opened() as feed:
        ended = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", SHOP_IMPORTED],
            cwd=ROOT,
            env={DATABASE: database.url, REDIS: feed.url},
            check=True,
            capture_output=True,
            text=True,
        )
        assert (database.visits, feed.visits) == (0, 0)
    assert ended.stderr.splitlines() == [f"said by {n}" for n in ("uvicorn.error", "arq.worker", "arq.connections")]


@pytest.mark.slow
async def test_an_unfulfilled_order_is_a_202_and_is_fulfilled_when_a_worker_comes(
    database_url: str, redis_url: str
) -> None:
    await emptied(redis_url)
    async with empty_database(database_url) as url, running(API, url, redis_url) as api:
        address = (await api.says(SERVING))[1]
        async with httpx.AsyncClient(base_url=address, timeout=40) as http:
            await http.put("/stock/tea", json={"quantity": 5})
            pending = (await http.post("/orders", json={"sku": "tea", "quantity": 5})).json()
            answer = await http.post(f"/orders/{pending['id']}/fulfil")
            body = answer.json()
            assert (answer.status_code, answer.headers["location"]) == (202, f"/jobs/{body['job']['id']}")
            assert int(answer.headers["retry-after"]) >= 1
            assert body == {"job": {"id": body["job"]["id"], "state": "queued"}, "order": pending}
            assert 25 <= answer.elapsed.total_seconds() < 27
            job = {"id": body["job"]["id"], "task": "fulfil_order", "state": "queued", "attempt": 1, "error": None}
            assert (await http.get(answer.headers["location"])).json() == job
            async with running(WORKER, url, redis_url):
                assert (await http.post(f"/orders/{pending['id']}/fulfil")).json()["status"] == "fulfilled"
            assert (await http.get(answer.headers["location"])).json() == job | {"state": "done"}
