"""A server that stops: at a signal waits are answered and streams end, and without one streams end by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING

import httpx
import pytest

from coord.http.interruption import stop_observed
from tests.counter import placed, the_job
from tests.raw import call
from tests.shop import SERVING, Command, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

AT_ONCE = 3.0
"""Seconds, on however slow a machine; a wait over HTTP lasts 25."""
UVICORN = ("uvicorn", "--port", "0")


@contextlib.asynccontextmanager
async def serving(
    database_url: str, redis_url: str, app: str, *options: str, duration: float = 60
) -> AsyncIterator[tuple[Command, str]]:
    command = (*UVICORN, f"tests.stopping_app:{app}", *options)
    async with running(command, database_url, redis_url, COORD_TEST_DURATION=str(duration)) as server:
        yield server, (await server.says(SERVING))[1]


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(("app", "prefix"), [("app", ""), ("outer", "/mounted")])
async def test_at_a_signal_waits_are_answered_at_once_and_streams_end(
    database_url: str,
    redis_url: str,
    session_maker: SessionMaker,
    app: str,
    prefix: str,
    number: signal.Signals,
    order_id: int,
) -> None:
    """Of a mounted application too, whose lifespan no server runs."""
    path = f"{prefix}/orders/{order_id}"
    known = {"If-None-Match": "*", "Prefer": "wait=20"}
    async with (
        serving(database_url, redis_url, app) as (server, address),
        call(address, "POST", f"{path}/fulfil") as waiting,
        call(address, "GET", path, known) as polling,
        call(address, "GET", f"{path}/events") as following,
        call(address, "GET", f"{path}/events", {"Last-Event-ID": "1"}) as silent,
    ):
        job = await the_job(session_maker)
        async with call(address, "GET", f"{prefix}/jobs/{job.id}/events") as job_stream:
            await (await job_stream.begun()).event()
            assert await (await following.begun()).event() is not None
            await silent.begun()
            server.process.send_signal(number)
            async with asyncio.timeout(AT_ONCE):
                assert (await waiting.begun()).status == 202
                assert (await waiting.json())["job"] == {"id": str(job.id), "state": "queued"}
                assert waiting.headers["location"] == f"/jobs/{job.id}"
                assert (await polling.begun()).status == 304
                assert [await stream.event() for stream in (following, silent, job_stream)] == [None] * 3
        await server.exit_status(within=10)
        assert server.count("Traceback|ERROR") == 0, "\n".join(server.lines)


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize(("app", "prefix"), [("app", ""), ("outer", "/mounted")])
async def test_a_server_that_stops_without_a_signal_ends_with_its_streams_time(
    database_url: str, redis_url: str, session_maker: SessionMaker, app: str, prefix: str
) -> None:
    path = f"{prefix}/orders/{await placed(session_maker)}"
    options = ("--limit-max-requests", "3")
    async with serving(database_url, redis_url, app, *options, duration=2) as (server, address):
        async with call(address, "GET", f"{path}/events") as following, httpx.AsyncClient(base_url=address) as http:
            assert await (await following.begun()).event() is not None
            for _ in range(2):
                assert (await http.get(path)).status_code == 200
            assert await following.event(within=2 + AT_ONCE) is None
        assert await server.exit_status(within=10) == 0


async def test_every_observer_is_notified_and_the_previous_handler_is_called() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    try:
        with stop_observed() as first, stop_observed() as second:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(first, second), AT_ONCE)
            with stop_observed() as late:
                assert late.done()
        assert told == [signal.SIGTERM]
        with stop_observed() as next_one:
            assert not next_one.done()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("replaced", [False, True])
async def test_signal_handlers_are_restored_after_the_last_observer(replaced: bool) -> None:
    """Or as somebody else has set them meanwhile."""

    def another(*_: object) -> None: ...

    before = signal.getsignal(signal.SIGTERM)
    with stop_observed(), stop_observed():
        assert signal.getsignal(signal.SIGTERM) is not before
        if replaced:
            signal.signal(signal.SIGTERM, another)
    assert signal.getsignal(signal.SIGTERM) is (another if replaced else before)
    signal.signal(signal.SIGTERM, before)


def test_an_event_loop_outside_the_main_thread_installs_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    async def observe() -> None:
        with stop_observed() as stopped:
            seen.extend([stopped.done(), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=lambda: asyncio.run(observe()))
    thread.start()
    thread.join(10)
    assert seen == [False, before]
