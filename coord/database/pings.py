"""Pings: connections of a pool that are asked whether they live before they are given to anybody (`pool_pre_ping`).

SQLAlchemy tells nobody that it asks. But what was returned to the pool and is in use again, and was not given out yet,
is asked just now.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from time import monotonic
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry


@dataclass(frozen=True, slots=True, eq=False)
class Ping:
    entry: ConnectionPoolEntry
    driver: Any
    """asyncpg's own connection."""
    seen_at: float
    """When it was first seen, on the monotonic clock."""


class Pings:
    """Of a pool, by the thread that it is made in. Costs two calls for each time that a connection is used."""

    def __init__(self) -> None:
        self._thread = get_ident()
        self._returned: dict[ConnectionPoolEntry, Ping | None] = {}
        """What is in the pool, and what has come of it since it was looked at."""

    def on_checkin(self, _dbapi_connection: Any, entry: ConnectionPoolEntry) -> None:
        if get_ident() == self._thread:  # it may be the collector of garbage that returns it, outside any event loop
            self._returned[entry] = None

    def on_checkout(self, _dbapi_connection: Any, entry: ConnectionPoolEntry, _proxy: Any) -> None:
        self._returned.pop(entry, None)

    def look(self) -> list[Ping]:
        """Those that are under way, and were when this was last called."""
        now, found = monotonic(), []
        for entry, ping in [*self._returned.items()]:
            driver = entry.driver_connection
            if driver is None or driver.is_closed():
                del self._returned[entry]
            elif not entry.in_use:
                self._returned[entry] = None
            elif ping is None or ping.driver is not driver:
                self._returned[entry] = Ping(entry, driver, now)
            else:
                found.append(ping)
        return found

    def is_under_way(self, ping: Ping) -> bool:
        return self._returned.get(ping.entry) is ping and ping.entry.in_use
