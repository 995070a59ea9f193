"""Redis is killed, frozen, restarted, full, or refuses: the ledger goes on, and nothing is lost with it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from coord.queue.keys import QueueKeys
from tests.faults.customer import ELSEWHERE, SLACK, answered, statuses
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.faults.customer import Answer, Shop
    from tests.faults.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.slow]

RECOVERS = ELSEWHERE + SLACK
"""Seconds after Redis serves again: clients' pauses, and the five in which a job is found that was not handed over."""


async def outage(shop: Shop, stack: Stack, refusal: Any) -> list[list[Answer]]:
    """What is asked before it and while it lasts; each is done once, the former at once."""
    late = await shop.ordered(number=2)
    async with shop.holding() as held:
        await held.run_by(*stack.workers)
        bad = refusal(stack)
        await bad.__aenter__()
    try:
        before = await answered(*held.asking)
        asking = [shop.asked(order) for order in late]
        placed = await shop.call("POST", "/orders", json={"sku": "nothing", "quantity": 1})
        health = await shop.call("GET", "/healthz")
        await asyncio.sleep(2)
    finally:
        await bad.__aexit__(None, None, None)
    over = time.monotonic()
    answers = await answered(*asking)
    assert time.monotonic() - over < RECOVERS
    assert (placed.status, health.status) == (201, 200)
    assert statuses(before) == statuses(answers) == {200}
    assert statuses(await shop.fulfilled(3)) == {200}
    return before


@asynccontextmanager
async def killed(stack: Stack) -> AsyncIterator[None]:
    await asyncio.to_thread(stack.valkey.stop, "immediate")
    yield
    await asyncio.to_thread(stack.valkey.start)


@asynccontextmanager
async def restarted(stack: Stack) -> AsyncIterator[None]:
    await asyncio.to_thread(stack.valkey.restart)
    yield


@asynccontextmanager
async def frozen(stack: Stack) -> AsyncIterator[None]:
    os.kill(stack.valkey.pid, signal.SIGSTOP)
    yield
    os.kill(stack.valkey.pid, signal.SIGCONT)


@asynccontextmanager
async def slow(stack: Stack) -> AsyncIterator[None]:
    """Each answer, to everybody, three seconds late."""
    for link in stack.links("redis"):
        link.answers_later = 3.0
    yield
    for link in stack.links("redis"):
        link.answers_later = 0.0


@asynccontextmanager
async def configured(stack: Stack, **settings: str) -> AsyncIterator[None]:
    async with stack.redis() as redis:
        was = {name: (await redis.config_get(name))[name] for name in settings}
        for name, value in settings.items():
            await redis.config_set(name, value)
        yield
        for name, value in was.items():
            await redis.config_set(name, value)


def without_replicas(stack: Stack) -> Any:
    return configured(stack, **{"min-replicas-to-write": "1"})


def full(stack: Stack) -> Any:
    return configured(stack, maxmemory="1")


@asynccontextmanager
async def nobody_more(stack: Stack) -> AsyncIterator[None]:
    """It admits no client but those who have come by now, and ours have just lost their connections."""
    async with configured(stack, maxclients="1"):
        for link in stack.links("redis"):
            link.reset()
        yield


@asynccontextmanager
async def cannot_save(stack: Stack) -> AsyncIterator[None]:
    """A dump that has failed: MISCONF to whoever writes."""
    async with stack.redis() as redis:
        obstacle = stack.valkey.directory / "dump.rdb"
        obstacle.unlink(missing_ok=True)
        obstacle.mkdir()
        await redis.config_set("save", "3600 1")
        await redis.bgsave()

        async def has_failed() -> bool:
            found = await redis.info("persistence")
            return bool(found["rdb_last_bgsave_status"] == "err")

        await eventually(has_failed)
        yield
        obstacle.rmdir()
        await redis.config_set("save", "")
        await redis.bgsave()
        await eventually(lambda: _saved(redis))
        obstacle.unlink()


async def _saved(redis: Any) -> bool:
    return bool((await redis.info("persistence"))["rdb_last_bgsave_status"] == "ok")


@asynccontextmanager
async def without_rights(stack: Stack) -> AsyncIterator[None]:
    async with stack.redis() as redis:
        await redis.execute_command("ACL", "SETUSER", "operator", "on", ">secret", "~*", "&*", "+@all")
        await redis.execute_command("AUTH", "operator", "secret")
        await redis.execute_command("ACL", "SETUSER", "default", "-@all", "+ping")
        yield
        await redis.execute_command("ACL", "SETUSER", "default", "+@all")


@asynccontextmanager
async def only_reading(stack: Stack) -> AsyncIterator[None]:
    """It has become the replica of one that is not there."""
    async with stack.redis() as redis:
        await redis.replicaof("127.0.0.1", "1")
        yield
        await redis.replicaof("NO", "ONE")


REFUSALS = [killed, restarted, frozen, slow, full, without_replicas, nobody_more, cannot_save, without_rights]


@pytest.mark.parametrize("refusal", [*REFUSALS, only_reading], ids=lambda refusal: refusal.__name__)
async def test_what_redis_does_not_do_is_waited_out(shop: Shop, stack: Stack, refusal: Any) -> None:
    await outage(shop, stack, refusal)


@pytest.mark.parametrize("kind", ["dump", "append-only file"])
async def test_an_old_file_of_redis_that_is_restored_does_nothing_twice(shop: Shop, stack: Stack, kind: str) -> None:
    """It has messages of jobs that are done, and not those of jobs that are queued."""
    valkey, old = stack.valkey, stack.directory / "old"
    shutil.rmtree(old, ignore_errors=True)
    workers = stack.workers
    await asyncio.gather(*(worker.stop() for worker in workers))
    early = [shop.asked(order) for order in await shop.ordered(number=3)]
    async with stack.redis() as redis:
        await eventually(lambda: _has(redis, QueueKeys().feed, 3))
        await _kept(redis, kind)
        name = "dump.rdb" if kind == "dump" else "appendonlydir"
        source = valkey.directory / name
        (shutil.copy if kind == "dump" else shutil.copytree)(source, old)
        if kind != "dump":
            await redis.config_set("appendonly", "no")
    await asyncio.gather(*(worker.start() for worker in workers))
    assert statuses(await answered(*early)) <= {200, 202}
    async with shop.holding() as held:
        await held.run_by(*workers)
        await asyncio.to_thread(valkey.stop, "immediate")
        _remove(source)
        shutil.move(old, source)
        await _started_with(stack, kind)
    assert statuses(await answered(*held.asking)) == {200}
    assert statuses(await shop.fulfilled(3)) == {200}
    _remove(source)


async def _has(redis: Any, feed: str, count: int) -> bool:
    return int(await redis.zcard(feed)) == count


async def _kept(redis: Any, kind: str) -> None:
    if kind == "dump":
        await redis.save()
        return
    await redis.config_set("appendonly", "yes")

    async def rewritten() -> bool:
        found = await redis.info("persistence")
        return not found["aof_rewrite_in_progress"] and not found.get("aof_rewrite_scheduled")

    await eventually(rewritten, within=10)


async def _started_with(stack: Stack, kind: str) -> None:
    """It reads a dump as it starts, and the other file only if it is told to write it."""
    valkey = stack.valkey
    valkey._persist = kind != "dump"
    await asyncio.to_thread(valkey.start)
    valkey._persist = False


def _remove(path: Any) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
