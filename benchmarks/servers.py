"""The servers of a run: a PostgreSQL and a Valkey of its own, with default settings, in a temporary directory."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import asyncpg

from coord.dev.embedded import PostgreSQL, Valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@dataclass(frozen=True, slots=True)
class Servers:
    directory: Path
    """Deleted with them."""
    database_url: str
    redis_url: str
    postgresql_pid: int
    redis_pid: int

    @property
    def dsn(self) -> str:
        return self.database_url.replace("+asyncpg", "")

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.dsn)
        try:
            yield connection
        finally:
            await connection.close()


S = TypeVar("S", bound=Servers)


@contextmanager
def opened(kind: type[S]) -> Iterator[S]:
    with tempfile.TemporaryDirectory(prefix="coord-benchmark-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o711)  # as root, PostgreSQL runs as somebody else
        with PostgreSQL(directory / "postgresql") as postgresql, Valkey(directory / "valkey") as valkey:
            yield kind(directory, postgresql.url, valkey.url, postgresql.pid, valkey.pid)
