"""The suite's engine behind PgBouncer, when `COORD_TEST_POOLER` names how statements are prepared there, and its port.

The ways are those of docs/pgbouncer.md: none is kept, and asyncpg's own default for a PgBouncer that keeps them itself
(`max_prepared_statements`, 1.21).
"""

from __future__ import annotations

import os
from typing import Any

import asyncpg
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

WAYS: dict[str, dict[str, Any]] = {
    "unnamed": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
    "prepared": {},
}

UNTOLD: dict[str, Any] = {"connect_args": {"connection_class": asyncpg.Connection}}
"""Of an engine whose connections no other process can be told how to make: a worker's heartbeat is a thread then."""


def create_engine(database_url: str, **options: Any) -> AsyncEngine:
    """An engine on this database, through the pooler when there is one."""
    if not (given := os.environ.get("COORD_TEST_POOLER")):
        return create_async_engine(database_url, **options)
    way, port = given.split()
    options["connect_args"] = {**options.get("connect_args", {}), **WAYS[way]}
    return create_async_engine(make_url(database_url).set(port=int(port)), **options)
