"""advanced-alchemy's routing maker: jobs, locks, writes and waits go to the writer, and reads where it sends them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy

if sqlalchemy.__version__ >= "2.1":  # `bind` is a property there, which its sessions set before they are made
    pytest.skip("advanced-alchemy 1.12 cannot make a routing session on SQLAlchemy 2.1", allow_module_level=True)

from advanced_alchemy.config.routing import RoutingConfig
from advanced_alchemy.routing import RoutingAsyncSessionMaker
from sqlalchemy import event, text

from tests.round_trip import application, rename, running
from tests.shop import empty_database

if TYPE_CHECKING:
    from asyncpg import Connection

pytestmark = pytest.mark.usefixtures("tables", "ledger")


async def test_the_round_trip_goes_by_the_writer(database_url: str, redis_url: str, observer: Connection) -> None:
    async with empty_database(database_url) as elsewhere:
        config = RoutingConfig(engines={"default": [database_url], "read": [elsewhere]})
        maker = RoutingAsyncSessionMaker(
            config, engine_config={"pool_size": 15}, session_config={"expire_on_commit": False}
        )
        reader = maker.replica_engines[0]
        read: list[str] = []
        event.listen(reader.sync_engine, "before_cursor_execute", lambda *given: read.append(given[2]))
        app: Any = application(maker, redis_url)
        async with running(app, [rename], maker, redis_url, database_url) as http:
            assert (await http.post("/users/1")).json() == "renamed"
            assert read == []
        assert await observer.fetchval("SELECT state FROM coord_jobs") == "done"
        async with maker() as session:
            await session.execute(text("SELECT 1"))  # asked by nobody, it still goes to the reader
        assert read == ["SELECT 1"]
        await maker.close_all()
