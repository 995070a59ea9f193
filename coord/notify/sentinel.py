"""Where Redis is, as one URL says it: redis-py's kinds, and `redis+sentinel://` for a server that Sentinel knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

SENTINEL_PORT = 26_379
_SCHEME = re.compile(r"rediss?\+sentinel://")
_URL = re.compile(
    r"redis(?P<tls>s?)\+sentinel://((?P<username>[^:@/]*)(:(?P<password>[^@/]*))?@)?(?P<hosts>[^@/?#]+)"
    r"/(?P<master>[^/?#]+)(/(?P<database>\d+))?/?"
)
MALFORMED = "a URL of Sentinel looks like redis+sentinel://user:password@host:26379,host:26379/name/0"


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Where Sentinel is, and by which name it knows the server; all else is the server's and not Sentinel's."""

    hosts: Sequence[tuple[str, int]]
    master: str
    database: int
    username: str | None
    password: str | None
    tls: bool

    @classmethod
    def of(cls, url: str) -> Self | None:
        """None for a URL of another kind. Raises `ValueError`, without the password, for one that is malformed."""
        if not _SCHEME.match(url):
            return None
        found = _URL.fullmatch(url)
        if found is None:
            raise ValueError(MALFORMED)
        return cls(
            hosts=[_host(each) for each in found["hosts"].split(",")],
            master=unquote(found["master"]),
            database=int(found["database"] or 0),
            username=unquote(found["username"] or "") or None,
            password=unquote(found["password"] or "") or None,
            tls=bool(found["tls"]),
        )


def redis_from_url(url: str, **options: Any) -> Redis:
    """redis-py's client for a URL as `Coordinator` and `worker_settings` take it; it connects to nothing yet.

    That is `redis://`, `rediss://`, `unix://`, and for a server that Sentinel knows by a name
    `redis+sentinel://user:password@host:26379,host:26379/name/0` (`rediss+sentinel` if it wants TLS): user, password,
    database and options are the server's; Sentinel is asked without, but for options called `socket_…`. `aclose()`
    also closes what asks Sentinel. Raises `ValueError` for a malformed URL.
    """
    sentinels = Sentinels.of(url)
    if sentinels is None:
        plain: Redis = Redis.from_url(url, **options)
        return plain
    server = {"db": sentinels.database, "username": sentinels.username, "password": sentinels.password}
    manager: Any = Sentinel(sentinels.hosts, **server, ssl=sentinels.tls, **options)  # type: ignore[no-untyped-call]
    client: _Known = manager.master_for(sentinels.master, redis_class=_Known)
    client.asked = manager.sentinels
    return client


class _Known(Redis):
    """A server that Sentinel knows: redis-py leaves the connections by which it asks Sentinel open."""

    asked: Sequence[Redis] = ()

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        for sentinel in self.asked:
            await sentinel.aclose()


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    try:
        host, port = parts.hostname, parts.port or SENTINEL_PORT
    except ValueError:
        raise ValueError(MALFORMED) from None
    if not host:
        raise ValueError(MALFORMED)
    return host, port
