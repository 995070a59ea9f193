"""Where the ledger is: where `create_ledger(connection, schema=…)` has put it, whatever a session translates.

In a schema of its own it is found under any `search_path`, too: by its table of versions, once an engine.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, text
from sqlalchemy.engine import Dialect

_SCHEMAS = text("""
    SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relname = 'coord_schema' AND relkind = 'r' AND has_schema_privilege(nspname, 'USAGE') ORDER BY nspname
""")

_places: WeakKeyDictionary[Dialect, str | None] = WeakKeyDictionary()
"""By engine, whose dialect is its own; None is the default schema."""


def place_ledger(dialect: Dialect, schema: str | None) -> None:
    """Where the engine with this dialect has its ledger from now on."""
    _places[dialect] = schema


def known_schema(dialect: Dialect) -> str | None:
    """As `ledger_schema` has found it."""
    return _places.get(dialect)


def ledger_schema(connection: Connection) -> str | None:
    """None for that which names without a schema are in, also while there is no ledger.

    Raises `RuntimeError` if there are several to choose from.
    """
    dialect = connection.dialect
    if dialect in _places:
        return _places[dialect]
    schemas = connection.scalars(_SCHEMAS).all()
    default = dialect.default_schema_name in schemas
    if len(schemas) > 1 and not default:
        raise RuntimeError(
            f"There is a ledger in each of the schemas {', '.join(schemas)}: call create_ledger(connection, schema=…) "
            "with a connection of this engine first, or let its role use one of them."
        )
    place = schemas[0] if schemas and not default else None
    if schemas:
        place_ledger(dialect, place)
    return place


def ledger_options(connection: Connection) -> dict[str, Any]:
    """Execution options for statements about the ledger: it is not the caller's to translate."""
    schema = ledger_schema(connection)
    return {"schema_translate_map": schema and {None: schema}}
