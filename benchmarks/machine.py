"""What a run says of where it ran, and whether its code stayed the same meanwhile."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from redis import Redis

from benchmarks.loop import installed, run

if TYPE_CHECKING:
    from benchmarks.servers import Servers

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGES = {"sqlalchemy": "SQLAlchemy", "asyncpg": "asyncpg", "redis": "redis-py", "uvloop": "uvloop"}


def machine(servers: Servers) -> str:
    async def postgresql() -> str:
        async with servers.connection() as connection:
            server: str = await connection.fetchval("SHOW server_version")
            return server

    with Redis.from_url(servers.redis_url) as redis:
        valkey = redis.info("server")["valkey_version"]
    versions = [f"{name} {version(package)}" for package, name in PACKAGES.items() if installed(package)]
    programs = f"PostgreSQL {run(postgresql())} (fsync on, its default settings), Valkey {valkey}"
    python = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{python}; {programs}; {', '.join(versions)}."


def sources() -> dict[Path, int]:
    """When each file was written."""
    files = [path for name in ("benchmarks", "coord") for path in (ROOT / name).rglob("*.py")]
    return {path: path.stat().st_mtime_ns for path in files}
