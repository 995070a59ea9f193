"""Redis fails over by Sentinel: coord's parts, since the shop itself knows of no Sentinel."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from arq.connections import RedisSettings
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel

from coord import Coordinator, job_transaction
from coord.dev.embedded import Valkey
from coord.dev.server import free_port
from tests.serving import eventually
from tests.workers import client, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.workers import Office

pytestmark = [pytest.mark.faults, pytest.mark.slow]

MASTER = "shop"


class Watched(Valkey):
    """A Sentinel, whose configuration says what it watches."""

    def __init__(self, directory: Path, master: Valkey) -> None:
        super().__init__(directory, port=free_port())
        self._master = master

    def _command(self, port: int) -> list[Any]:
        lines = [
            f"port {port}",
            "bind 127.0.0.1",
            f"dir {self.directory}",
            f"sentinel monitor {MASTER} 127.0.0.1 {self._master.port} 1",
            f"sentinel down-after-milliseconds {MASTER} 1000",
            f"sentinel failover-timeout {MASTER} 3000",
        ]
        configuration = self.directory / "sentinel.conf"
        configuration.write_text("\n".join(lines) + "\n")
        return [self.program, configuration, "--sentinel"]


@asynccontextmanager
async def watched(directory: Path) -> AsyncIterator[tuple[Valkey, Valkey, Watched]]:
    """A master, its replica, and a Sentinel that knows both."""
    with Valkey(directory / "one") as master, Valkey(directory / "two") as replica:
        two: Any = client(replica.url)
        await two.replicaof("127.0.0.1", str(master.port))
        await two.aclose()
        with Watched(directory / "sentinel", master) as sentinel:
            asking: Any = client(sentinel.url)

            async def knows_both() -> bool:
                return len(await asking.execute_command("SENTINEL", "REPLICAS", MASTER)) == 1

            await eventually(knows_both, within=20)
            await asking.aclose()
            yield master, replica, sentinel


async def task(ctx: dict[str, Any]) -> None:
    async with job_transaction(ctx):
        """Nothing."""


# What redis-py asks the sentinels by belongs to nobody who would close it: neither arq nor its own client does.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_failover_by_sentinel_is_got_over(script: Office, tmp_path: Path) -> None:
    async with watched(tmp_path) as (master, replica, sentinel):
        addresses = [("127.0.0.1", sentinel.port)]
        settings = RedisSettings(host=addresses, sentinel=True, sentinel_master=MASTER)
        manager: Any = Sentinel(addresses)
        redis = manager.master_for(MASTER)
        async with Coordinator(script.session_maker, redis=redis), working(script, [task], redis=settings) as worker:
            assert (await script.final(await script.enqueue(task))).state == "done"
            await asyncio.to_thread(master.stop, "immediate")
            meanwhile = await script.enqueue(task)

            async def promoted() -> bool:
                with contextlib.suppress(MasterNotFoundError):
                    return bool((await manager.discover_master(MASTER))[1] == replica.port)
                return False

            await eventually(promoted, within=20)
            assert (await script.final(meanwhile, within=15)).state == "done"
            row = await script.final(await script.enqueue(task), within=15)
            assert (row.state, row.attempt) == ("done", 1)
            assert worker.lives
        await redis.aclose()
        for each in manager.sentinels:
            await each.aclose()
    gc.collect()
