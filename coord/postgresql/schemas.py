"""The `schema_translate_map` that a session's statements are under."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coord.postgresql.transaction import connection_in_use

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

Schemas = tuple[tuple[str | None, str | None], ...]


def schemas_of(session: Session) -> Schemas:
    """The session's own (SQLAlchemy 2.1), else that of the engine or connection it is bound to."""
    options: Mapping[str, Any] = getattr(session, "execution_options", {})
    if "schema_translate_map" not in options and session.bind is not None:
        options = session.bind.get_execution_options()
    return _schemas(options)


def schemas_in_use(session: Session) -> Schemas:
    """That of the connection which the session's transaction has taken, else `schemas_of` it."""
    connection = connection_in_use(session)
    return (connection and _schemas(connection.get_execution_options())) or schemas_of(session)


def _schemas(options: Mapping[str, Any]) -> Schemas:
    return tuple((options.get("schema_translate_map") or {}).items())
