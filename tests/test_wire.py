"""Redis spoken to without redis-py, over a connection that redis-py has made."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from coord.hints.wire import Wire, connected, packed
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NAME = "wire"


class Scene:
    def __init__(self, wire: Wire, heard: asyncio.Queue[Any], redis: Redis) -> None:
        self.wire = wire
        self.heard = heard
        self.redis = redis

    async def ask(self, *command: bytes | str | int) -> Any:
        self.wire.write(packed(*command))
        async with asyncio.timeout(5):
            return await self.heard.get()


@pytest.fixture(params=[2, 3])
async def scene(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    async with opened(redis_url, f"{redis_url}?client_name={NAME}&protocol={request.param}") as scene:
        yield scene


@asynccontextmanager
async def opened(redis_url: str, url: str) -> AsyncIterator[Scene]:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    async with Redis.from_url(redis_url) as redis, Redis.from_url(url, socket_timeout=0.1) as own:
        async with connected(own.connection_pool, limit=5) as connection:
            yield Scene(Wire(connection, heard.put_nowait), heard, redis)

        async def is_gone() -> bool:
            return not [client for client in await redis.client_list() if client["name"] == NAME]

        await eventually(is_gone)


async def test_answers_come_in_order_whatever_their_size(scene: Scene) -> None:
    texts = [bytes([65 + n]) * 10**n for n in range(7)]
    for text in texts:
        scene.wire.write(packed("ECHO", text))
    for text in texts:
        assert await scene.heard.get() == text
    assert await scene.ask("SET", "ключ", 5) == b"OK"
    assert await scene.redis.getdel("ключ") == b"5"


async def test_errors_are_redis_pys(scene: Scene) -> None:
    assert isinstance(await scene.ask("EVALSHA", "0" * 40, 0), NoScriptError)
    assert isinstance(await scene.ask("NOSUCHCOMMAND"), ResponseError)
    assert await scene.ask("ECHO", "on") == b"on"


async def test_messages_are_heard(scene: Scene) -> None:
    assert [*await scene.ask("SUBSCRIBE", "bell")][:2] == [b"subscribe", b"bell"]
    await scene.redis.publish("bell", "")
    assert [*await scene.heard.get()] == [b"message", b"bell", b""]


async def test_no_limit_of_redis_pys_ends_it(scene: Scene) -> None:
    """Its `socket_timeout`, a tenth of a second here, is for answers, and there are none to a silent subscription."""
    assert await scene.ask("BLPOP", "nothing", "0.3") is None
    assert not scene.wire.end.done()


async def test_it_says_when_it_is_lost_and_why(scene: Scene) -> None:
    me = await scene.ask("CLIENT", "ID")
    await scene.redis.client_kill_filter(_id=me)
    assert isinstance(await scene.wire.end, RedisConnectionError)


async def test_what_cannot_be_dealt_with_is_the_end(redis_url: str) -> None:
    def heard(_message: Any) -> None:
        raise LookupError("of the listener's")

    async with Redis.from_url(redis_url) as own, connected(own.connection_pool, limit=5) as connection:
        wire = Wire(connection, heard)
        wire.write(packed("PING"))
        assert isinstance(await wire.end, LookupError)


async def test_who_does_not_answer_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(100):
            pass
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Redis.from_url(url) as own:
            with pytest.raises(TimeoutError):
                async with connected(own.connection_pool, limit=0.1):
                    pass
