"""The publisher: every ring arrives once Redis is there, by few packets, and nobody waits for it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

import coord.hints.publisher
from coord.embedded import Valkey
from coord.hints.publisher import Publisher, ring_of
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAME = "publisher"


class Scene:
    """A publisher, what it says of Redis, and what others hear of it."""

    def __init__(self, redis: Redis, publisher: Publisher, told: list[Exception | None], heard: list[bytes]) -> None:
        self.redis = redis
        self.publisher = publisher
        self.told = told
        self.heard = heard

    def ring(self, *numbers: int) -> None:
        self.publisher.send({b"%d" % number: ring_of(b"%d" % number) for number in numbers})

    async def has_heard(self, *numbers: int) -> None:
        await eventually(lambda: asyncio.sleep(0, {b"%d" % number for number in numbers} <= set(self.heard)))

    async def connections(self) -> list[str]:
        return [client["id"] for client in await self.redis.client_list() if client["name"] == NAME]

    async def kill(self) -> None:
        for client in await self.connections():
            await self.redis.client_kill_filter(_id=client)


@pytest.fixture
async def scene(redis_url: str) -> AsyncIterator[Scene]:
    async with opened(f"{redis_url}?client_name={NAME}", redis_url) as scene:
        yield scene


@asynccontextmanager
async def opened(url: str, redis_url: str) -> AsyncIterator[Scene]:
    told: list[Exception | None] = []
    heard: list[bytes] = []
    async with Redis.from_url(redis_url) as redis, Redis.from_url(url) as own, redis.pubsub() as subscription:
        await subscription.psubscribe("*")
        await subscription.get_message(timeout=5)

        async def listen() -> None:
            async for message in subscription.listen():
                heard.append(message["channel"])  # noqa: PERF401 - it never ends

        listening = asyncio.create_task(listen())
        async with Publisher(own, told.append).open() as publisher:
            yield Scene(redis, publisher, told, heard)
        listening.cancel()
        await asyncio.wait([listening])


async def test_every_ring_arrives_whatever_is_under_way(scene: Scene) -> None:
    for number in range(3_000):
        scene.ring(number, number + 1)
        if not number % 7:
            await asyncio.sleep(0)
    await scene.has_heard(*range(3_001))
    assert len(await scene.connections()) == 1
    assert set(scene.told) == {None}


async def test_what_was_rung_is_sent_before_the_end(redis_url: str) -> None:
    async with opened(redis_url, redis_url) as scene:
        scene.ring(1)
    assert scene.told == [None]


async def test_an_idle_connection_that_redis_closes_is_replaced_in_silence(scene: Scene) -> None:
    scene.ring(1)
    await scene.has_heard(1)
    await scene.kill()
    await eventually(lambda: _none(scene.connections()))
    scene.ring(2)
    await scene.has_heard(2)
    assert set(scene.told) == {None}


async def _none(found: Any) -> bool:
    return not await found


async def test_rings_under_way_when_a_connection_is_lost_are_sent_again(scene: Scene) -> None:
    scene.ring(1)
    await scene.has_heard(1)
    victims = await scene.connections()
    await scene.redis.client_pause(300, all=False)  # PUBLISH is held back, CLIENT KILL is not
    scene.ring(2)
    await asyncio.sleep(0.05)
    scene.ring(3)
    for client in victims:
        await scene.redis.client_kill_filter(_id=client)
    await scene.has_heard(2, 3)
    assert set(scene.told) == {None}


async def test_rings_that_redis_does_not_answer_are_dropped_and_later_ones_are_not(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.hints.publisher, "LIMIT", 0.2)
    scene.ring(1)
    await scene.has_heard(1)
    await scene.redis.client_pause(1_000, all=False)
    scene.ring(2)
    await eventually(lambda: asyncio.sleep(0, len(scene.told) > 1), within=0.9)
    assert isinstance(scene.told[1], TimeoutError)
    await scene.redis.client_unpause()
    scene.ring(3)
    await scene.has_heard(3)


async def test_what_redis_refuses_is_told(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.acl_setuser(
            "deaf", enabled=True, nopass=True, reset_channels=True, channels=["allowed"], commands=["+@all"]
        )
    try:
        async with opened(redis_url.replace("//", "//deaf:any@"), redis_url) as scene:
            scene.ring(1)
            await eventually(lambda: asyncio.sleep(0, scene.told))
            assert "permission" in str(scene.told[0])
            scene.publisher.send({b"allowed": ring_of(b"allowed")})
            await eventually(lambda: asyncio.sleep(0, None in scene.told))
    finally:
        async with Redis.from_url(redis_url) as redis:
            await redis.acl_deluser("deaf")


async def test_rings_without_redis_are_dropped_and_arrive_again_once_it_is_there(server_directory: Path) -> None:
    with Valkey(server_directory / "absent") as valkey:
        async with opened(valkey.url, valkey.url) as scene:
            scene.ring(1)
            await scene.has_heard(1)
            valkey.kill()
            for number in range(2, 50):
                scene.ring(number)
                await asyncio.sleep(0.005)
            errors = [error for error in scene.told if error is not None]
            assert 1 <= len(errors) <= 10
            valkey.start()
            told = len(scene.told)

            async def answered() -> bool:
                scene.ring(50)
                return None in scene.told[told:]

            await eventually(answered)


async def test_many_who_ring_at_once_share_packets(redis_url: str) -> None:
    """One who rings alone does not wait for company."""
    packets: list[int] = []
    redis = urlsplit(redis_url)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(redis.hostname, redis.port)

        async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, counted: bool) -> None:
            while data := await source.read(1 << 16):
                if counted:
                    packets.append(data.count(b"PUBLISH"))
                target.write(data)
            target.close()

        await asyncio.gather(pipe(reader, back, counted=True), pipe(there, writer, counted=False))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
        proxy = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        async with opened(proxy, redis_url) as scene:
            for number in range(5):
                scene.ring(number)
                await scene.has_heard(number)
            assert [count for count in packets if count] == [1] * 5
            packets.clear()
            for number in range(5, 500):
                scene.ring(number)
                await asyncio.sleep(0)
            await scene.has_heard(*range(5, 500))
            assert len(packets) < 100
