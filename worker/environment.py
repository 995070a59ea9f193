"""The variables that configure the shop. They are read, and refused if malformed, at import; nothing connects."""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import TYPE_CHECKING, Never

from arq.connections import RedisSettings
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from coord import redis_from_url

if TYPE_CHECKING:
    from sqlalchemy import URL

DATABASE = "COORD_DATABASE_URL"
REDIS = "COORD_REDIS_URL"
METRICS_PORT = "COORD_METRICS_PORT"
METRICS_HOST = "COORD_METRICS_HOST"
ADMIN_TOKEN = "COORD_ADMIN_TOKEN"
CONSOLE_TOKEN = "COORD_CONSOLE_TOKEN"
CONSOLE_READ_TOKEN = "COORD_CONSOLE_READ_TOKEN"
SHORTEST_TOKEN = 16
# The ports that docker-compose.yml publishes.
DEFAULT_DATABASE_URL = "postgresql+asyncpg://coord:coord@127.0.0.1:5432/coord"
DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"


def database_url() -> URL:
    try:
        url = make_url(os.environ.get(DATABASE, DEFAULT_DATABASE_URL))
    except (ArgumentError, ValueError):  # not shown: what cannot be parsed may hold a password anywhere
        refuse(DATABASE, "malformed; it looks like postgresql+asyncpg://user:password@host:5432/database")
    if url.drivername != "postgresql+asyncpg":
        refuse(DATABASE, f"needs the driver postgresql+asyncpg, not {url.drivername}")
    return url


def redis_url() -> str:
    url = os.environ.get(REDIS, DEFAULT_REDIS_URL)
    try:
        redis_from_url(url)
        if "+sentinel:" not in url:
            RedisSettings.from_dsn(url.rstrip("/"))  # which minds a database that is no number
    except (RuntimeError, ValueError):
        refuse(REDIS, "malformed; it looks like redis://user:password@host:6379/0")
    return url


def admin_token() -> str | None:
    """Who has it may look after jobs over HTTP; without one nobody may, but in development."""
    return _token(ADMIN_TOKEN)


def console_token() -> str | None:
    """Who has it may see and do everything in the console; without one of the two it is closed."""
    return _token(CONSOLE_TOKEN)


def console_read_token() -> str | None:
    """Who has it may look at the console, and see no arguments."""
    token = _token(CONSOLE_READ_TOKEN)
    if token is not None and token == console_token():
        refuse(CONSOLE_READ_TOKEN, f"must differ from {CONSOLE_TOKEN}")
    return token


def metrics_port() -> int | None:
    """Where a worker answers Prometheus; without one it does not."""
    text = os.environ.get(METRICS_PORT)
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        refuse(METRICS_PORT, "is the number of a port")
    return int(text)


def metrics_host() -> str:
    """Where it listens for Prometheus: on this machine alone unless told otherwise."""
    text = os.environ.get(METRICS_HOST) or "127.0.0.1"
    try:
        return str(ip_address(text))
    except ValueError:
        refuse(METRICS_HOST, "is an IP address, such as 0.0.0.0")


def is_development() -> bool:
    """As `coord dev` says."""
    return os.environ.get("COORD_DEVELOPMENT") == "1"


def _token(variable: str) -> str | None:
    token = os.environ.get(variable) or None
    if token is not None and len(token) < SHORTEST_TOKEN:
        refuse(variable, f"needs at least {SHORTEST_TOKEN} characters")
    return token


def refuse(variable: str, reason: str) -> Never:
    """End the process: one line on stderr, naming the variable to mend, and exit status 1."""
    raise SystemExit(" ".join(f"{variable}: {reason}".split())) from None
