"""Redis: does it keep what it has, does it never evict, may coord do what it does."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from coord.cli.checks.finding import Finding, Setup
from coord.queue.keys import QueueKeys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OLDEST = (6, 2)
FULL = 0.9
RIGHTS = "+@read +@write +@sortedset +@string +@pubsub +@scripting +@connection +time +info +@transaction"


async def server(setup: Setup) -> AsyncIterator[Finding]:
    if setup.redis is None:
        return
    try:
        await setup.redis.ping()
        info: dict[str, Any] = await setup.redis.info()
    except NoPermissionError as error:
        yield Finding("redis rights", f"{error}", f"give the user {RIGHTS} and the namespace's keys and channels")
        return
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if version < OLDEST and "valkey_version" not in info:
        yield Finding("redis version", f"Redis is {info['redis_version']}", "upgrade to 6.2 or newer, or Valkey")
    if info.get("cluster_enabled"):
        yield Finding("redis cluster", "Redis is a cluster, which workers refuse", "give coord a server of its own")
    if info.get("role") != "master":
        yield Finding("redis replica", "this Redis is a replica and takes no writes", "name the primary in the URL")
    policy, limit = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory", 0)
    if policy != "noeviction":
        what = f"maxmemory-policy is {policy}: jobs that are handed over may vanish, and come seconds late"
        yield Finding("eviction", what, "maxmemory-policy noeviction")
    if limit and info["used_memory"] > FULL * limit:
        what = f"{info['used_memory']} of {limit} bytes are in use: new jobs wait for the reconciler"
        yield Finding("redis memory", what, "raise maxmemory, or let workers catch up")
    if not info.get("aof_enabled") and await _saves_nothing(setup.redis):
        what = "Redis keeps nothing on disk: after a restart every queued job is handed over again"
        yield Finding("persistence", what, "appendonly yes")


async def _saves_nothing(redis: Any) -> bool:
    try:
        return not (await redis.config_get("save")).get("save")
    except ResponseError:  # this user may not ask
        return False


async def rights(setup: Setup) -> AsyncIterator[Finding]:
    """Each kind of command is tried once, on a key that nobody uses."""
    if setup.redis is None:
        return
    key = f"{QueueKeys(setup.namespace, 'doctor').feed}:probe"
    commands: tuple[tuple[Any, ...], ...] = (
        ("ZADD", key, 1, "a"),
        ("ZPOPMIN", key, 1),
        ("BZPOPMIN", key, 0.01),
        ("SET", key, "1", "EX", 1),
        ("EVAL", "return redis.call('GET', KEYS[1])", 1, key),
        ("DEL", key),
        ("TIME",),
        ("PUBLISH", f"{setup.namespace}:doctor", ""),
    )
    refused = []
    for command in commands:
        try:
            await setup.redis.execute_command(*command)  # type: ignore[no-untyped-call]
        except NoPermissionError:
            refused.append(command[0])
        except RedisError as error:
            yield Finding("redis", f"{command[0]} is refused: {error}", "see the log of Redis")
            return
    pubsub = setup.redis.pubsub()
    try:
        await pubsub.subscribe(f"{setup.namespace}:doctor")
        while await pubsub.get_message(timeout=0.2) is not None:
            pass
    except NoPermissionError:
        refused.append("SUBSCRIBE")
    finally:
        with suppress(RedisError):
            await pubsub.aclose()  # type: ignore[no-untyped-call]
    if refused:
        what = f"this user may not {', '.join(refused)}"
        yield Finding("redis rights", what, f"give it {RIGHTS}, ~* and &*, or those that begin with the namespace")
