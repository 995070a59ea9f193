"""The shared read of waits is given up when nothing answers, and keeps its place where it has to queue."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from coord.waiting import reader
from coord.waiting.reader import Reader
from tests.models import Document, User
from tests.proxy import Proxy

if TYPE_CHECKING:
    from coord.database.target import Key

LIMIT, USUAL_LIMIT = 0.1, reader.READ_TIMEOUT_SECONDS
MODELS = pytest.mark.parametrize(("model", "key"), [(User, (1,)), (Document, (UUID(int=1),))])
"""Plain, and with relationships that are mapped eager."""

pytestmark = pytest.mark.usefixtures("tables")


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "READ_TIMEOUT_SECONDS", LIMIT)


@MODELS
@pytest.mark.parametrize("pool_timeout", [30, None])
async def test_a_read_keeps_its_place_in_the_pools_queue(
    database_url: str, model: type, key: Key, pool_timeout: float | None
) -> None:
    """Given up and tried again it would stand behind everybody who has come meanwhile, and might never be first."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=1, pool_timeout=pool_timeout)
    async with contextlib.AsyncExitStack() as holding:
        for _ in range(2):
            await holding.enter_async_context(engine.connect())
        read = asyncio.create_task(Reader(engine, inspect(model), ()).entities([key]))
        await asyncio.sleep(0)  # it stands in the queue
        later = [asyncio.create_task(engine.connect().start()) for _ in range(2)]
        _, waiting = await asyncio.wait({read, *later}, timeout=5 * LIMIT)
        assert waiting == {read, *later}
    assert await read == {}
    for connecting in later:
        await (await connecting).close()
    await engine.dispose()


@MODELS
@pytest.mark.parametrize("connected", [True, False])
async def test_a_read_that_nothing_answers_is_given_up(
    database_url: str, model: type, key: Key, connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy takes two seconds more to close its connection."""
    async with Proxy(database_url).opened() as proxy:
        engine = create_async_engine(proxy.url, pool_pre_ping=True)
        if connected:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
        proxy.flows.clear()
        async with asyncio.timeout(10) as patience:
            with pytest.raises(TimeoutError):
                await Reader(engine, inspect(model), ()).entities([key])
        assert not patience.expired()
        proxy.flows.set()
        monkeypatch.setattr(reader, "READ_TIMEOUT_SECONDS", USUAL_LIMIT)
        assert await Reader(engine, inspect(model), ()).entities([key]) == {}
        await engine.dispose()
