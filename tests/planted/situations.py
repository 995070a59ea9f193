"""The load and the fault that bring a bug out, at the moment at which they do; each holds on the library as it is."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.serving import eventually

if TYPE_CHECKING:
    from tests.planted.world import World


async def crowd(world: World) -> None:
    """Ten at once, on one worker."""
    await world.worker()
    await asyncio.gather(*(world.post(f"parcel {n}", inside=0.05) for n in range(10)))
    await asyncio.gather(*(world.get(f"parcel {n}") for n in range(10)))


async def slow_commit(world: World) -> None:
    """It takes half a second, in which nobody else sees the row."""
    await world.put("slow")
    await world.get("slow")


async def refused_commit(world: World) -> None:
    """By a constraint that is checked then."""
    await world.put("refused")


async def swallowed_error(world: World) -> None:
    """A statement fails, and the handler goes on as if nothing had happened."""
    await world.put("swallowed", swallows=True)


async def delivered_twice(world: World) -> None:
    """When it is done."""
    await world.worker()
    await world.post("parcel")
    await world.deliver_again("parcel")
    await world.post("another", before=0.5)  # so that it has had its time


async def killed_after_the_effect(world: World) -> None:
    """While the task goes on after its block."""
    worker = await world.worker()
    asked = asyncio.create_task(world.post("parcel", after=4.0))
    await world.has_label("parcel")
    await world.is_running("parcel")
    worker.kill()
    await world.worker()
    await asked


async def killed_in_the_block(world: World) -> None:
    """Before its commit."""
    worker = await world.worker()
    asked = asyncio.create_task(world.post("parcel", wait=20.0, inside=3.0))
    await world.has_lock()
    await world.is_running("parcel")
    worker.kill()
    await world.worker()
    await asked


async def frozen_in_the_block(world: World) -> None:
    """For good, and with the table's lock; another worker is to do its work."""
    world.bounds = replace(world.bounds, final=13.0, served=0.0)
    worker = await world.worker()
    first = asyncio.create_task(world.post("parcel", wait=1.0, inside=3.0))
    await world.has_lock()
    await world.is_running("parcel")
    worker.send_signal(signal.SIGSTOP)
    await world.worker()
    await world.calm()
    await first


async def flushed(world: World) -> None:
    """While all jobs are in Redis alone, but for the ledger."""
    world.bounds = replace(world.bounds, final=10.0, served=0.0)
    await asyncio.gather(*(world.post(f"parcel {n}", wait=0.0) for n in range(5)))
    await world.flush()
    await world.worker()
    await world.calm()


async def told_to_stop(world: World) -> None:
    """While a job runs that takes longer than the worker's half second of grace."""
    world.bounds = replace(world.bounds, served=0.0)
    worker = await world.worker()
    await world.post("parcel", wait=0.0, before=3.0)
    await world.is_running("parcel")
    worker.send_signal(signal.SIGTERM)
    await world.worker()


async def longer_than_one_waits(world: World) -> None:
    world.bounds = replace(world.bounds, served=0.0)
    await world.worker()
    await world.post("parcel", wait=1.0, before=5.0)


async def changed_before_the_wait(world: World) -> None:
    """The effect lands between the handler's commit and its wait, which knows of no job."""
    await world.worker()
    await asyncio.gather(
        *(world.post(f"parcel {n}", wait=3.0, waits_after=1.0, without_its_job=True) for n in range(3))
    )


async def committed_after_a_while(world: World) -> None:
    """Of the enqueueing."""
    await world.worker()
    await asyncio.gather(*(world.post(f"parcel {n}", wait=2.0, commits_after=0.3) for n in range(5)))


async def tried_again(world: World) -> None:
    """The first attempt fails, and the second one comes two seconds later."""
    await world.worker()
    await world.post("parcel", retries=2.0)


async def old_message_after_a_retry(world: World) -> None:
    """The first attempt's, while the second one is yet to come."""
    await world.worker()
    asked = asyncio.create_task(world.post("parcel", retries=3.0))
    await eventually(lambda: world.database.fetchval("SELECT count(*) FROM coord_jobs WHERE attempt = 2"), within=10)
    await world.deliver_again("parcel", attempt=1)
    await asked


async def error_swallowed_in_the_task(world: World) -> None:
    """One that has rolled its block back: the job has failed, and its client is told so."""
    world.bounds = replace(world.bounds, may_fail=True, served=0.0)
    await world.worker()
    await world.post("parcel", swallows=True)


async def two_keys(world: World) -> None:
    """Of two jobs of one task that are unfinished at a time."""
    await world.worker()
    first = asyncio.create_task(world.post("parcel", unique_key="one", before=6.0))
    await world.is_running("parcel")
    await asyncio.gather(first, world.post("another", unique_key="other"))


async def one_at_a_time(world: World) -> None:
    """Tasks that rely on it, and on no lock."""
    await world.worker()
    await asyncio.gather(
        *(world.post(f"parcel {n}", wait=15.0, one_at_a_time="printer", reads_outside=0.3) for n in range(4))
    )


async def longer_than_a_look(world: World) -> None:
    """A job that runs for as long as the reconciler needs to take another one for lost."""
    await world.worker()
    await world.worker()
    await world.post("parcel", wait=15.0, before=5.0)
    await world.post("another", before=5.0)


async def watched(world: World) -> None:
    """A stream, while its row changes three times."""
    await world.put("parcel")
    stream = asyncio.create_task(world.stream("parcel", last=4))
    for _ in range(3):
        await asyncio.sleep(0.4)
        await world.step("parcel")
    await stream


async def read_by_many(world: World) -> None:
    """Long polls for one row, each of which is to see at least what the one before has."""
    await world.put("parcel")
    for _ in range(3):
        polls = [asyncio.create_task(world.get("parcel", seconds=3.0)) for _ in range(4)]
        await asyncio.sleep(0.3)
        await world.step("parcel")
        await asyncio.gather(*polls)


async def retried_by_hand(world: World) -> None:
    """When it is done, which is refused."""
    await world.worker()
    await world.post("parcel")
    job = await world.database.fetchval("SELECT id FROM coord_jobs")
    await world.http.post(f"/jobs/{job}/retry")
    await world.post("another", before=0.5)


async def a_bit_of_everything(world: World) -> None:
    """A crowd on two workers, one of which is killed, and an empty Redis."""
    first = await world.worker()
    await world.worker()
    asked = [asyncio.create_task(world.post(f"parcel {n}", wait=15.0, inside=0.1)) for n in range(12)]
    await world.has_lock()
    first.kill()
    await world.flush()
    await asyncio.gather(*asked, *(world.get(f"parcel {n}") for n in range(12)))
