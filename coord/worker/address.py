"""Where Redis is: one URL or arq's settings, for every connection that a worker makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from arq.connections import RedisSettings
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.sentinel import Sentinel

SECONDS = 2.0
"""Until a connection, or an answer, counts as lost."""


@dataclass(frozen=True, slots=True)
class Address:
    """Opens nothing by itself."""

    redis: str | RedisSettings

    def settings(self) -> RedisSettings:
        """As arq reads them, for its health check."""
        if isinstance(self.redis, RedisSettings):
            return self.redis
        settings = RedisSettings.from_dsn(self.redis.rstrip("/"))
        settings.username = settings.username and unquote(settings.username)  # which from_dsn leaves to its caller
        settings.password = settings.password and unquote(settings.password)
        return settings

    def pool(self) -> ConnectionPool:
        """Connections for one event loop."""
        limits: dict[str, Any] = {"socket_connect_timeout": SECONDS, "socket_timeout": SECONDS}
        if isinstance(self.redis, str):
            return ConnectionPool.from_url(self.redis, **limits)
        settings = self.redis
        common = {
            "db": settings.database,
            "username": settings.username,
            "password": settings.password,
            "max_connections": settings.max_connections,
            **limits,
        }
        if settings.sentinel:
            sentinel = Sentinel(settings.host, ssl=settings.ssl, **limits)  # type: ignore[no-untyped-call]
            master: Redis = sentinel.master_for(settings.sentinel_master, **common)
            return master.connection_pool
        own = {
            name: getattr(settings, name)
            for name in (
                "host",
                "port",
                "unix_socket_path",
                "ssl",
                "ssl_keyfile",
                "ssl_certfile",
                "ssl_cert_reqs",
                "ssl_ca_certs",
                "ssl_ca_data",
                "ssl_check_hostname",
            )
        }
        return Redis(**common, **own).connection_pool
