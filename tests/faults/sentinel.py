"""A failover by Sentinel, as a program: API and worker are told of it by one URL.

A process of its own, since arq does not close the connections by which redis-py asks Sentinel.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coord import Coordinator, job_transaction, redis_from_url
from coord.dev.embedded import Valkey
from coord.dev.server import free_port
from tests.serving import eventually
from tests.workers import client, opened, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
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


async def fail_over(database_url: str, directory: Path) -> None:
    async with (
        watched(directory) as (master, replica, sentinel),
        opened(database_url, master.url, coordinated=False) as script,
    ):
        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/{MASTER}"  # one of them is away
        asking: Any = client(sentinel.url)
        async with Coordinator(script.session_maker, redis=url), working(script, [task], redis=url) as worker:
            assert (await script.final(await script.enqueue(task))).state == "done"
            await asyncio.to_thread(master.stop, "immediate")
            meanwhile = await script.enqueue(task)

            async def promoted() -> bool:
                address = await asking.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
                return int(address[1]) == replica.port

            await eventually(promoted, within=20)
            assert (await script.final(meanwhile, within=15)).state == "done"
            row = await script.final(await script.enqueue(task), within=15)
            assert (row.state, row.attempt) == ("done", 1)
            assert worker.lives
        async with redis_from_url(url) as redis:
            assert await redis.get("coord:health") is None
        await asking.aclose()


if __name__ == "__main__":
    asyncio.run(fail_over(sys.argv[1], Path(sys.argv[2])))
