"""The channels of rows and tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Table
from sqlalchemy.orm import Mapper, Session

from coord.database.engine import bind_for_writes
from coord.database.schemas import Schemas, is_untranslated, schemas_in_use
from coord.database.target import Key
from coord.notify.changes import Change

MAX_ROWS_PER_TABLE = 100
"""Of one transaction; for more of them the channel of the table is published instead."""
MAX_KEY_BYTES = 200
"""In a channel's name; longer keys are hashed."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Names under one namespace and database, so that what shares a Redis with others does not wake them."""

    namespace: str
    database: str

    def table(self, mapper: Mapper[Any], schemas: Schemas) -> bytes:
        """The channel of the table; classes that inherit share their base's, and with it the meaning of a key."""
        return _table(self.namespace, self.database, mapper, schemas)

    def row(self, mapper: Mapper[Any], schemas: Schemas, key: Key) -> bytes:
        parts = (str(value).replace("\\", "\\\\").replace("/", "\\/") for value in key)
        name = "/".join(parts).encode(errors="surrogatepass")
        if len(name) > MAX_KEY_BYTES:
            name = hashlib.blake2b(name, digest_size=16).hexdigest().encode()
        return self.table(mapper, schemas) + b":" + name

    def of_changes(self, session: Session, changes: Collection[Change]) -> list[bytes]:
        crowded = _crowded(changes) if len(changes) > MAX_ROWS_PER_TABLE else ()
        told = dict.fromkeys((mapper, None if mapper in crowded else key) for mapper, key in changes)
        return [
            self.table(mapper, schemas) if key is None else self.row(mapper, schemas, key)
            for mapper, key in told
            for schemas in [() if is_untranslated(mapper) else schemas_in_use(session, **bind_for_writes(mapper))]
        ]


@lru_cache(maxsize=256)
def _table(namespace: str, database: str, mapper: Mapper[Any], schemas: Schemas) -> bytes:
    table = mapper.base_mapper.local_table
    schema, name = (table.schema, table.name) if isinstance(table, Table) else (None, str(mapper.base_mapper))
    schema = dict(schemas).get(schema, schema)
    return f"{namespace}:{database}:{schema or ''}.{name}".encode()


def _crowded(changes: Collection[Change]) -> set[Mapper[Any]]:
    rows = Counter(mapper for mapper, key in changes if key is not None)
    return {mapper for mapper, count in rows.items() if count > MAX_ROWS_PER_TABLE}
