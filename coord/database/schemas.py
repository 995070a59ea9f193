"""The `schema_translate_map` that a session's statements are under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Engine, Table, event
from sqlalchemy.orm import Mapper, Session, SessionTransaction

from coord.database.engine import bind_of

Schemas = tuple[tuple[str | None, str | None], ...]

UNTRANSLATED = "coord.untranslated"
"""In a `MetaData`'s `info`: its tables have one place, whatever map a session is under."""
_SCHEMAS = "coord.schemas"
"""In a session's `info`: those of its last transaction, by engine, if that had any."""


@event.listens_for(Session, "after_begin")
def _note_schemas(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    known = session.info.get(_SCHEMAS, {})
    known.pop(connection.engine, None)
    if schemas := _schemas(connection.get_execution_options()):
        session.info[_SCHEMAS] = {**known, connection.engine: schemas}


def read_as(session: Session, other: Session, **bind_arguments: Any) -> None:
    """Have a new session read what the other one reads: with its `info`, and under its map."""
    schemas, bind = schemas_in_use(other, **bind_arguments), bind_of(session, **bind_arguments)
    session.info.update({name: value for name, value in other.info.items() if not str(name).startswith("coord.")})
    if schemas and bind is not None:
        session.info[_SCHEMAS] = {bind.engine: schemas}


def schemas_of(session: Session, **bind_arguments: Any) -> Schemas:
    """The session's own (SQLAlchemy 2.1), else that of the engine or connection it is bound to."""
    return _before_any(session, bind_of(session, **bind_arguments))


def schemas_in_use(session: Session, **bind_arguments: Any) -> Schemas:
    """Those of the session's transaction, or of its last one; before its first statement `schemas_of` it."""
    bind = bind_of(session, **bind_arguments)
    known: dict[Engine, Schemas] = session.info.get(_SCHEMAS, {})
    found = None if bind is None else known.get(bind.engine)
    return _before_any(session, bind) if found is None else found


def _before_any(session: Session, bind: Engine | Connection | None) -> Schemas:
    options: Mapping[str, Any] = getattr(session, "execution_options", {})
    if bind is not None and "schema_translate_map" not in options:
        options = bind.get_execution_options()
    return _schemas(options)


def is_untranslated(mapper: Mapper[Any]) -> bool:
    """Whether the class's table has one place, whatever map a session is under."""
    table = mapper.local_table
    return isinstance(table, Table) and bool(table.metadata.info.get(UNTRANSLATED))


def schemas_for(mapper: Mapper[Any], schemas: Schemas) -> Schemas:
    """Those under which the class's table is."""
    return () if is_untranslated(mapper) else schemas


def _schemas(options: Mapping[str, Any]) -> Schemas:
    return tuple((options.get("schema_translate_map") or {}).items())
