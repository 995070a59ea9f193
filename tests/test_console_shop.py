"""The shop's console, as a process: opened by its environment, and ended by a signal."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest

from tests.desk import FULL, READ
from tests.shop import API, SERVING, running
from worker.environment import CONSOLE_READ_TOKEN, CONSOLE_TOKEN

AT_ONCE = 5.0
"""Seconds, on however slow a machine; a stream lasts 60."""


async def test_without_a_token_the_shops_console_is_closed(database: str, redis_url: str) -> None:
    async with running(API, database, redis_url, COORD_DEVELOPMENT="1") as api:
        address = (await api.says(SERVING))[1]
        async with httpx.AsyncClient(base_url=address) as client:
            answer = await client.get("/console", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (403, "/console/")
    assert CONSOLE_TOKEN in answer.text
    assert CONSOLE_READ_TOKEN in answer.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_at_a_signal_the_shops_console_ends_its_streams(
    database: str, redis_url: str, number: signal.Signals
) -> None:
    environment = {CONSOLE_TOKEN: FULL, CONSOLE_READ_TOKEN: READ}
    async with running(API, database, redis_url, **environment) as api:
        address = (await api.says(SERVING))[1]
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            assert (await client.post("/console/sign-in", data={"token": READ})).status_code == 303
            events = {"Accept": "text/event-stream"}
            async with client.stream("GET", "/console/", headers=events) as stream:
                lines = stream.aiter_lines()
                async for line in lines:
                    if line.startswith("event: page"):
                        break
                api.process.send_signal(number)
                async with asyncio.timeout(AT_ONCE):
                    assert [line async for line in lines if line.startswith("event: away")] == []
        assert await api.exit_status(within=AT_ONCE) in (0, -number)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({CONSOLE_TOKEN: "short"}, f"{CONSOLE_TOKEN}: needs at least 16 characters"),
        ({CONSOLE_READ_TOKEN: "short"}, f"{CONSOLE_READ_TOKEN}: needs at least 16 characters"),
        ({CONSOLE_TOKEN: FULL, CONSOLE_READ_TOKEN: FULL}, f"{CONSOLE_READ_TOKEN}: must differ from {CONSOLE_TOKEN}"),
    ],
)
async def test_tokens_that_protect_nothing_end_the_shop_with_one_line(
    database_url: str, redis_url: str, environment: dict[str, str], line: str
) -> None:
    async with running(API, database_url, redis_url, **environment) as api:
        assert await api.exit_status() != 0
        assert api.lines == [line]
