"""Where Redis is: one URL or arq's settings, for every connection that a worker makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from arq.connections import RedisSettings
from redis.asyncio import Redis

from coord.notify.sentinel import Sentinels
from coord.worker.maintenance.beat import redis_of
from coord.worker.patience import WAITED_OUT, Patience

REDIS_TIMEOUT_SECONDS = 2.0
"""Until a connection, or an answer, counts as lost."""
_PLACE = ("host", "port", "unix_socket_path")
_TLS = ("keyfile", "certfile", "cert_reqs", "ca_certs", "ca_data", "check_hostname")


@dataclass(frozen=True, slots=True)
class Address:
    """Opens nothing by itself."""

    redis: str | RedisSettings

    def settings(self, patience: Patience) -> RedisSettings:
        """As arq reads them, for a client that outlives any absence of Redis."""
        settings = self._sentinels or self.redis
        if not isinstance(settings, RedisSettings):
            settings = _from_url(settings)
            settings.username = settings.username and unquote(settings.username)  # which from_dsn leaves to its caller
            settings.password = settings.password and unquote(settings.password)
        return replace(settings, retry=patience, retry_on_timeout=True, retry_on_error=list(WAITED_OUT))

    @property
    def _sentinels(self) -> RedisSettings | None:
        """Where Sentinel is, if a URL says that; as arq reads it."""
        found = Sentinels.of(self.redis) if isinstance(self.redis, str) else None
        if found is None:
            return None
        server: dict[str, Any] = {
            "database": found.database,
            "username": found.username,
            "password": found.password,
            "ssl": found.tls,
        }
        return RedisSettings(host=[*found.hosts], sentinel=True, sentinel_master=found.master, **server)

    def client(self) -> Redis:
        """For one event loop; its answers are bounded, and nothing is tried twice."""
        client: Redis = redis_of(self.parameters())
        return client

    def parameters(self) -> dict[str, Any]:
        """As JSON can have them, for another process."""
        options: dict[str, Any] = dict.fromkeys(("socket_connect_timeout", "socket_timeout"), REDIS_TIMEOUT_SECONDS)
        settings = self._sentinels or self.redis
        if isinstance(settings, str):
            return {"url": settings, "options": options}
        options |= {"db": settings.database, "username": settings.username, "password": settings.password}
        options["ssl"] = settings.ssl
        if settings.sentinel:
            return {"sentinels": settings.host, "master": settings.sentinel_master, "options": options}
        names = [*_PLACE, *(f"ssl_{name}" for name in _TLS)]
        return {"options": options | {name: getattr(settings, name) for name in names}}


def _from_url(url: object) -> RedisSettings:
    """`url` is not shown: what cannot be parsed may hold a password anywhere."""
    expected = "redis is a URL, redis://localhost:6379/0 say, or arq's RedisSettings"
    if not isinstance(url, str):
        raise TypeError(f"{expected}, and not of {type(url)}")
    try:
        return RedisSettings.from_dsn(url.rstrip("/"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{expected}, and what was given is none: {error}") from None
