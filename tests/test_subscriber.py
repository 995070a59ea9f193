"""The subscriber: whoever listens is notified, in batches of commands, whatever becomes of the connection."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

import coord.notify.subscriber
from coord.dev.embedded import Valkey
from coord.notify.client import connector
from coord.notify.subscriber import MAX_CHANNELS_PER_COMMAND, Subscriber
from tests.proxy import Proxy
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAME = "subscriber"


class Listener:
    def __init__(self) -> None:
        self.confirmed = 0
        self.messages = 0

    def subscribed(self) -> None:
        self.confirmed += 1

    def on_message(self) -> None:
        self.messages += 1


class Scene:
    """A subscriber, what it says of Redis, and another client."""

    def __init__(self, redis: Redis, subscriber: Subscriber, results: list[Exception | None]) -> None:
        self.redis = redis
        self.subscriber = subscriber
        self.results = results

    async def listen(self, *channels: bytes) -> Listener:
        listener = Listener()
        for channel in channels:
            self.subscriber.listen(channel, listener)
        await eventually(lambda: listener.confirmed >= len(channels))
        return listener

    async def receives(self, channel: bytes, listener: Listener) -> None:
        before = listener.messages
        assert await self.redis.publish(channel, b"") == 1
        await eventually(lambda: listener.messages == before + 1)

    async def connections(self) -> list[str]:
        return [client["id"] for client in await self.redis.client_list() if client["name"] == NAME]

    async def kill(self) -> None:
        for client in await self.connections():
            await self.redis.client_kill_filter(_id=client)


@pytest.fixture(params=["", "&protocol=3&decode_responses=True&socket_timeout=0.1"])
async def scene(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    """Whatever the client that was given is results about answers, its own are as it wants them."""
    async with opened(f"{redis_url}?client_name={NAME}{request.param}", redis_url) as scene:
        await eventually(lambda: None in scene.results)
        yield scene


@asynccontextmanager
async def opened(url: str, redis_url: str) -> AsyncIterator[Scene]:
    results: list[Exception | None] = []
    connect = connector(Redis.from_url(url).connection_pool)
    async with Redis.from_url(redis_url) as redis, Subscriber(connect, results.append).open() as subscriber:
        yield Scene(redis, subscriber, results)


async def test_messages_reach_the_listeners_of_their_channel_and_nobody_else(scene: Scene) -> None:
    one, other = await scene.listen(b"one"), await scene.listen(b"\xff\x00other")
    await scene.receives(b"one", one)
    await scene.receives(b"\xff\x00other", other)
    second = await scene.listen(b"one")
    await scene.receives(b"one", one)
    assert (one.messages, second.messages, other.messages) == (2, 1, 1)
    assert len(await scene.connections()) == 1


async def test_a_listener_that_fails_keeps_no_other_from_it(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Listener):
        def on_message(self) -> None:
            raise LookupError("of the listener's")

    scene.subscriber.listen(b"channel", Failing())
    await scene.receives(b"channel", await scene.listen(b"channel"))
    assert "of the listener's" in caplog.text
    assert scene.results == [None]


async def test_the_last_word_on_a_channel_counts(scene: Scene) -> None:
    """However often it is left and listened to within a turn of the loop, and across turns."""
    listener = await scene.listen(b"stays", b"goes")
    for turn in range(20):
        for channel in (b"stays", b"goes"):
            scene.subscriber.leave(channel, listener)
            scene.subscriber.listen(channel, listener)
        if turn % 3:
            await asyncio.sleep(0)
    scene.subscriber.leave(b"goes", listener)

    async def only_one_is_left() -> bool:
        return bool(await scene.redis.pubsub_channels() == [b"stays"])

    await eventually(only_one_is_left)
    await scene.receives(b"stays", listener)


async def test_a_channel_that_is_left_goes_though_nothing_else_is_said(scene: Scene) -> None:
    """Leaving is said with the next subscription, which would be no use to who has no next one."""
    listener = await scene.listen(b"one")
    scene.subscriber.leave(b"one", listener)
    await eventually(lambda: _none(scene), within=2)  # sooner than the next PING
    assert scene.subscriber.last_message(b"one") is None


async def test_what_comes_for_a_channel_that_was_left_is_not_kept(scene: Scene) -> None:
    listener = await scene.listen(b"one", b"two")
    await scene.receives(b"one", listener)
    scene.subscriber.leave(b"one", listener)
    await scene.redis.publish(b"one", b"late")
    await scene.receives(b"two", listener)
    assert scene.subscriber.last_message(b"one") is None


async def test_ten_thousand_channels_take_some_commands_and_a_second(scene: Scene) -> None:
    """And as many again when the connection is lost."""
    channels = [b"many:%d" % n for n in range(10 * MAX_CHANNELS_PER_COMMAND)]

    async def commands() -> int:
        return int((await scene.redis.info("commandstats")).get("cmdstat_subscribe", {"calls": 0})["calls"])

    before = await commands()
    async with asyncio.timeout(5):
        listener = await scene.listen(*channels)
    assert await commands() - before <= 11
    await scene.receives(channels[-1], listener)
    await scene.kill()
    await eventually(lambda: listener.confirmed >= 2 * len(channels))
    await scene.receives(channels[0], listener)
    assert await commands() - before <= 22
    for channel in channels:
        scene.subscriber.leave(channel, listener)
    await eventually(lambda: _none(scene))


async def _none(scene: Scene) -> bool:
    return not await scene.redis.pubsub_channels()


async def test_everything_is_subscribed_to_again_after_a_lost_connection(scene: Scene) -> None:
    listener, later = await scene.listen(b"one", b"two"), Listener()
    await scene.kill()
    await eventually(lambda: not scene.subscriber.connected)
    scene.subscriber.leave(b"two", listener)
    scene.subscriber.listen(b"three", later)
    await eventually(lambda: listener.confirmed >= 3 and later.confirmed)
    await scene.receives(b"one", listener)
    await scene.receives(b"three", later)
    assert sorted(await scene.redis.pubsub_channels()) == [b"one", b"three"]


async def test_a_channel_that_is_refused_keeps_its_listener_waiting_for_a_moment_only(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.acl_setuser(
            "half", enabled=True, nopass=True, reset_channels=True, channels=["allowed"], commands=["+@all"]
        )
    try:
        async with opened(redis_url.replace("//", "//half:any@"), redis_url) as scene:
            allowed = await scene.listen(b"allowed")
            await scene.receives(b"allowed", allowed)
            await scene.listen(b"refused")
            await eventually(lambda: any(isinstance(one, NoPermissionError) for one in scene.results))
    finally:
        async with Redis.from_url(redis_url) as redis:
            await redis.acl_deluser("half")


async def test_a_redis_that_falls_silent_is_found_out_and_heard_again(
    server_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coord.notify.subscriber, "PING_INTERVAL_SECONDS", 0.3)
    with Valkey(server_directory / "silent") as valkey:
        async with opened(valkey.url, valkey.url) as scene:
            listener = await scene.listen(b"channel")
            await eventually(lambda: scene.results.count(None) > 1)
            os.kill(valkey.pid, signal.SIGSTOP)
            try:
                await eventually(lambda: not scene.subscriber.connected)
                await eventually(lambda: any(isinstance(one, TimeoutError) for one in scene.results))
            finally:
                os.kill(valkey.pid, signal.SIGCONT)
            await eventually(lambda: scene.results[-1] is None)
            await scene.receives(b"channel", listener)


async def test_a_listener_is_called_again_once_redis_has_confirmed_what_took_long(redis_url: str) -> None:
    """Between the two it was read, and may have changed: that message was missed."""
    async with Proxy(redis_url).opened() as way, opened(way.url, redis_url) as scene:
        await eventually(lambda: None in scene.results)
        way.flows.clear()
        listener = Listener()
        scene.subscriber.listen(b"late", listener)
        await eventually(lambda: listener.confirmed == 1)
        assert await scene.redis.publish(b"late", b"") == 0
        way.flows.set()
        await eventually(lambda: listener.confirmed == 2)
        await scene.receives(b"late", listener)
