"""A URL names a server that Sentinel knows, for API, worker and doctor alike; the failover is in `tests/faults/`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import Coordinator, redis_from_url, worker_settings
from coord.cli.doctor import findings
from coord.notify.client import connector, exchange
from coord.worker.maintenance.beat import redis_of
from tests.faults.sentinel import MASTER, task, watched

if TYPE_CHECKING:
    from arq.connections import RedisSettings
    from redis.asyncio import Redis

FULL = "rediss+sentinel://ada:p%40ss@one:26380,[::1],three:26381/my%2Fmaster/3"
SERVER = {"db": 3, "username": "ada", "password": "p@ss"}


def asked(client: Redis) -> list[tuple[str, int]]:
    manager: Any = client.connection_pool
    sentinels = [each.connection_pool.connection_kwargs for each in manager.sentinel_manager.sentinels]
    return [(each["host"], each["port"]) for each in sentinels]


def settings_of(url: str) -> Any:
    session_maker = async_sessionmaker(create_async_engine("postgresql+asyncpg://nobody@nowhere/nothing"))
    return worker_settings([task], session_maker=session_maker, redis=url)


async def test_a_url_names_sentinels_and_what_they_know_and_the_rest_is_the_servers() -> None:
    client = redis_from_url(FULL, socket_timeout=3)
    pool: Any = client.connection_pool
    assert asked(client) == [("one", 26380), ("::1", 26379), ("three", 26381)]
    assert pool.service_name == "my/master"
    assert pool.connection_class is SentinelManagedSSLConnection
    assert SERVER.items() <= pool.connection_kwargs.items()
    for sentinel in pool.sentinel_manager.sentinels:
        options = sentinel.connection_pool.connection_kwargs
        assert options["socket_timeout"] == 3
        assert not any(options.get(name) for name in SERVER)


async def test_what_is_left_out_has_its_default() -> None:
    client = redis_from_url("redis+sentinel://one/mymaster")
    pool: Any = client.connection_pool
    assert asked(client) == [("one", 26379)]
    assert pool.connection_class is SentinelManagedConnection
    assert (pool.connection_kwargs["db"], pool.connection_kwargs["username"]) == (0, None)


async def test_other_urls_are_redis_pys() -> None:
    client = redis_from_url("redis://ada:p%40ss@one:6380/3", socket_timeout=3)
    assert client.connection_pool.connection_kwargs == {**SERVER, "host": "one", "port": 6380, "socket_timeout": 3}


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://one:26379",
        "redis+sentinel://one:26379/",
        "redis+sentinel:///mymaster",
        "redis+sentinel://one,,two/mymaster",
        "redis+sentinel://one:port/mymaster",
        "redis+sentinel://one:99999/mymaster",
        "redis+sentinel://:secret@one/mymaster/zero",
        "redis+sentinel://:secret@one/mymaster?db=1",
        "redis+sentinel://:se@cret@one/mymaster",
        "sentinel://one/mymaster",
        "nonsense",
    ],
)
async def test_a_malformed_url_is_refused_at_once_without_its_password(url: str) -> None:
    session_maker = async_sessionmaker(create_async_engine("postgresql+asyncpg://nobody@nowhere/nothing"))
    for refusing in (redis_from_url, lambda url: Coordinator(session_maker, redis=url)):
        with pytest.raises(ValueError, match="redis") as refused:
            refusing(url)
        assert "cret" not in str(refused.value)


async def test_a_worker_and_its_heartbeat_ask_the_same_sentinels_for_the_same_server() -> None:
    made = settings_of(FULL)
    arqs: RedisSettings = made.redis_settings
    client = redis_of(made.worker_config().address.parameters())
    assert (arqs.sentinel, arqs.host, arqs.sentinel_master) == (True, asked(client), "my/master")
    assert (arqs.database, arqs.username, arqs.password, arqs.ssl) == (3, "ada", "p@ss", True)
    assert asked(client) == asked(redis_from_url(FULL))
    assert SERVER.items() <= client.connection_pool.connection_kwargs.items()
    assert client.connection_pool.connection_class is SentinelManagedSSLConnection


async def test_the_server_is_found_and_every_connection_is_closed_again(database_url: str) -> None:
    with tempfile.TemporaryDirectory(prefix="coord-", ignore_cleanup_errors=True) as directory:
        async with watched(Path(directory)) as (master, _, sentinel):
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/{MASTER}"
            client = redis_from_url(url)
            own = connector(client.connection_pool)()
            [info] = await exchange(own, [("INFO", "server")])
            assert b"tcp_port:%d" % master.port in info
            await own.disconnect()
            await client.aclose()  # warnings are errors: one that was left open would be told of
            assert "redis" not in {finding.check async for finding in findings(database_url, url, None, "coord")}
            unknown: Any = redis_from_url(f"redis+sentinel://127.0.0.1:{sentinel.port}/another")
            with pytest.raises(RedisConnectionError, match="another"):
                await unknown.execute_command("PING")
            await unknown.aclose()
