"""The publisher: everything arrives once Redis is there, by few pipelines, and nobody waits for it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.asyncio.connection import Connection
from redis.exceptions import ResponseError

import coord.notify.client
from coord.dev.embedded import Valkey
from coord.notify.client import Command, connector, packed
from coord.notify.publisher import Publisher
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAME = "publisher"
ARGUMENTS = st.binary(max_size=20) | st.text(max_size=20) | st.integers() | st.floats()


def notice(channel: bytes) -> Command:
    return ("PUBLISH", channel, b"")


class Scene:
    """A publisher, what it says of Redis, and what others hear of it."""

    def __init__(
        self, redis: Redis, publisher: Publisher, results: list[Exception | None], received: list[bytes]
    ) -> None:
        self.redis = redis
        self.publisher = publisher
        self.results = results
        self.received = received

    def publish(self, *numbers: int) -> None:
        self.publisher.publish({b"%d" % number: [notice(b"%d" % number)] for number in numbers})

    async def has_heard(self, *numbers: int) -> None:
        await eventually(lambda: {b"%d" % number for number in numbers} <= set(self.received))

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
    results: list[Exception | None] = []
    received: list[bytes] = []
    connection = connector(Redis.from_url(url, socket_timeout=0.1).connection_pool)()
    async with Redis.from_url(redis_url) as redis, redis.pubsub() as subscription:
        await subscription.psubscribe("*")
        await subscription.get_message(timeout=5)

        async def listen() -> None:
            async for message in subscription.listen():
                received.append(message["channel"])  # noqa: PERF401 - it never ends

        listening = asyncio.create_task(listen())
        async with Publisher(connection, results.append).open() as publisher:
            yield Scene(redis, publisher, results, received)
        listening.cancel()
        await asyncio.wait([listening])


async def test_everything_arrives_whatever_is_under_way(scene: Scene) -> None:
    for number in range(3_000):
        scene.publish(number, number + 1)
        if not number % 7:
            await asyncio.sleep(0)
    await scene.has_heard(*range(3_001))
    assert len(await scene.connections()) == 1
    assert set(scene.results) == {None}


async def test_what_was_published_is_sent_before_the_end(redis_url: str) -> None:
    async with opened(redis_url, redis_url) as scene:
        scene.publish(1)
    assert scene.results == [None]


async def test_commands_are_carried_out_in_order_and_the_last_word_on_a_key_counts(scene: Scene) -> None:
    """At its place: a notice that was to be sent anyway comes after what it is about now."""
    scene.publisher.publish({"notice": [("SET", "order", "never"), notice(b"1")]})
    scene.publisher.publish({"job": [("SET", "order", "a"), ("APPEND", "order", "b")]})
    scene.publisher.publish({"notice": [("APPEND", "order", "c"), notice(b"1")]})
    assert scene.publisher.is_pending("job")
    await scene.has_heard(1)
    assert await scene.redis.getdel("order") == b"abc"
    await eventually(lambda: not scene.publisher.is_pending("job"))
    assert scene.received == [b"1"]


async def test_one_command_that_redis_refuses_keeps_no_other_from_it(scene: Scene) -> None:
    scene.publisher.publish({"a": [("NOSUCHCOMMAND",)], "b": [notice(b"1")]})
    await scene.has_heard(1)
    await eventually(lambda: len(scene.results) == 1)
    assert isinstance(scene.results[0], ResponseError)


@given(st.lists(st.lists(ARGUMENTS, max_size=5).map(lambda rest: ("SET", *rest)), max_size=5))
def test_commands_are_packed_as_redis_py_packs_them(commands: list[Command]) -> None:
    assert packed(commands) == b"".join(Connection().pack_commands(commands))


async def test_what_cannot_be_sent_harms_nothing_that_comes_later(scene: Scene) -> None:
    scene.publisher.publish({"a": [("SET", "a", object())]})  # type: ignore[list-item]
    await eventually(lambda: scene.results)
    scene.publish(1)
    await scene.has_heard(1)


async def test_an_idle_connection_that_redis_closes_is_replaced_in_silence(scene: Scene) -> None:
    scene.publish(1)
    await scene.has_heard(1)
    await scene.kill()
    await eventually(lambda: _none(scene.connections()))
    scene.publish(2)
    await scene.has_heard(2)
    assert set(scene.results) == {None}


async def _none(found: Any) -> bool:
    return not await found


async def test_what_is_under_way_when_a_connection_is_lost_is_sent_again(scene: Scene) -> None:
    scene.publish(1)
    await scene.has_heard(1)
    victims = await scene.connections()
    await scene.redis.client_pause(300, all=False)  # PUBLISH is held back, CLIENT KILL is not
    scene.publish(2)
    await asyncio.sleep(0.05)
    scene.publish(3)
    for client in victims:
        await scene.redis.client_kill_filter(_id=client)
    await scene.has_heard(2, 3)
    assert set(scene.results) == {None}


async def test_what_redis_does_not_answer_is_dropped_and_what_comes_later_is_not(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.notify.client, "ANSWER_TIMEOUT_SECONDS", 0.2)
    scene.publish(1)
    await scene.has_heard(1)
    await scene.redis.client_pause(1_000, all=False)
    scene.publish(2)
    await eventually(lambda: len(scene.results) > 1, within=0.9)
    assert isinstance(scene.results[1], TimeoutError)
    await scene.redis.client_unpause()
    scene.publish(3)
    await scene.has_heard(3)


async def test_after_a_slow_answer_nothing_waits_for_long(scene: Scene) -> None:
    """The pause after a pipeline grows with how long that took, up to a limit."""
    scene.publish(1)
    await scene.has_heard(1)
    await scene.redis.client_pause(500, all=False)
    scene.publish(2)
    await scene.has_heard(2)
    scene.publish(3)
    async with asyncio.timeout(0.4):
        await scene.has_heard(3)


async def test_what_redis_refuses_is_told(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.acl_setuser(
            "deaf", enabled=True, nopass=True, reset_channels=True, channels=["allowed"], commands=["+@all"]
        )
    try:
        async with opened(redis_url.replace("//", "//deaf:any@"), redis_url) as scene:
            scene.publish(1)
            await eventually(lambda: scene.results)
            assert "permission" in str(scene.results[0])
            scene.publisher.publish({b"allowed": [notice(b"allowed")]})
            await eventually(lambda: None in scene.results)
    finally:
        async with Redis.from_url(redis_url) as redis:
            await redis.acl_deluser("deaf")


async def test_what_is_published_without_redis_is_dropped_until_it_is_there_again(server_directory: Path) -> None:
    with Valkey(server_directory / "absent") as valkey:
        async with opened(valkey.url, valkey.url) as scene:
            scene.publish(1)
            await scene.has_heard(1)
            valkey.stop("immediate")
            for number in range(2, 50):
                scene.publish(number)
                await asyncio.sleep(0.005)
            errors = [error for error in scene.results if error is not None]
            assert 1 <= len(errors) <= 10
            valkey.start()
            before = len(scene.results)

            async def answered() -> bool:
                scene.publish(50)
                return None in scene.results[before:]

            await eventually(answered)


async def test_many_who_publish_at_once_share_pipelines(redis_url: str) -> None:
    """One who publishes alone does not wait for company."""
    pipelines: list[int] = []
    redis = urlsplit(redis_url)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(redis.hostname, redis.port)

        async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, counted: bool) -> None:
            while data := await source.read(1 << 16):
                if counted:
                    pipelines.append(data.count(b"PUBLISH"))
                target.write(data)
            target.close()

        await asyncio.gather(pipe(reader, back, counted=True), pipe(there, writer, counted=False))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
        proxy = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        async with opened(proxy, redis_url) as scene:
            for number in range(5):
                scene.publish(number)
                await scene.has_heard(number)
            assert [count for count in pipelines if count] == [1] * 5
            pipelines.clear()
            for number in range(5, 500):
                scene.publish(number)
                await asyncio.sleep(0)
            await scene.has_heard(*range(5, 500))
            assert len(pipelines) < 100
