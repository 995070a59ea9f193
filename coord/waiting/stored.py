"""Whether values that differ in Python are one in PostgreSQL: what was flushed is not always what comes back."""

from __future__ import annotations

import enum
import uuid
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    JSON,
    Boolean,
    Date,
    Enum,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    func,
    literal,
    select,
    true,
)
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Column, ColumnElement, Select
    from sqlalchemy.orm import Mapper
    from sqlalchemy.types import TypeEngine

    from coord.database.schemas import Schemas
    from coord.database.target import ColumnNames, Target

_DIALECT = asyncpg_dialect()  # type: ignore[no-untyped-call]
_EXACT: list[tuple[type[TypeEngine[Any]], type]] = [
    (Integer, int),
    (Boolean, bool),
    (Enum, enum.Enum),
    (Enum, str),
    (Date, date),
    (Uuid, uuid.UUID),
    (LargeBinary, bytes),
]


def is_certain(kind: TypeEngine[Any], seen: Any, value: Any) -> bool:
    """Whether values of this type that differ in Python differ in PostgreSQL, so that PostgreSQL need not compare."""
    if seen is None or value is None:
        return True
    if isinstance(kind, String) and not isinstance(kind, Enum):
        # CHAR(n) pads with spaces and VARCHAR(n) cuts them off, whatever the mapping calls the column.
        return isinstance(seen, str) and isinstance(value, str) and seen.rstrip(" ") != value.rstrip(" ")
    if type(seen) is not type(value) and not (isinstance(seen, uuid.UUID) and isinstance(value, uuid.UUID)):
        return False
    return any(isinstance(kind, exact) and isinstance(value, python) for exact, python in _EXACT)


def comparisons_of(
    target: Target[Any], schemas: Schemas, seen: Mapping[str, Any]
) -> Iterator[tuple[Select[Any], dict[str, Any]]]:
    """For each table of the row: whether the values, if they were stored there, would be what is there."""
    by_table: dict[Table, list[str]] = {}
    for name in seen:
        table = target.mapper.columns[name].table
        assert isinstance(table, Table)
        by_table.setdefault(table, []).append(name)
    for table, names in by_table.items():
        keys = {f"key_{n}": part for n, part in enumerate(target.key)}
        values = {f"seen_{n}": seen[name] for n, name in enumerate(names)}
        yield _comparison(target.mapper, table, tuple(names), schemas), keys | values


@lru_cache(maxsize=256)
def _comparison(mapper: Mapper[Any], table: Table, names: ColumnNames, schemas: Schemas) -> Select[Any]:
    """PostgreSQL makes a row of the values, by the very types of the table's columns, and writes both rows out.

    Text is compared, since not every type has an equality, and that of some (box, path) is no equality of values.
    """
    own = table.alias("own")
    columns = [mapper.columns[name] for name in names]
    pairs: list[Any] = []
    for n, column in enumerate(columns):
        pairs += [cast(literal(column.name), Text), _as_json(f"seen_{n}", column)]
    given = func.json_populate_record(own.table_valued(), func.json_build_object(*pairs))
    stored = given.table_valued(*[column.name for column in columns], name="given")
    same = and_(*(cast(stored.c[column.name], Text) == cast(own.c[column.key], Text) for column in columns))
    is_it = [
        own.c[_key_in(mapper, key, table).key] == bindparam(f"key_{n}", type_=key.type)
        for n, key in enumerate(mapper.primary_key)
    ]
    statement = select(same).select_from(own.join(stored, true())).where(*is_it)
    return statement.execution_options(schema_translate_map=dict(schemas)) if schemas else statement


def _as_json(name: str, column: Column[Any]) -> ColumnElement[Any]:
    """What JSON has of a value: PostgreSQL's text for it, which it reads by the column's type; JSON is itself."""
    parameter = bindparam(name, type_=column.type)
    plain = column.type.dialect_impl(_DIALECT)
    if isinstance(plain, JSON):
        return cast(parameter, column.type)
    known = "::" in str(parameter.compile(dialect=_DIALECT))
    return cast(parameter if known else cast(parameter, column.type), Text)


def _key_in(mapper: Mapper[Any], key: ColumnElement[Any], table: Table) -> Any:
    """The column of the table that has this part of the key: a subclass's table has its own."""
    columns: list[Any] = mapper.get_property_by_column(key).columns
    return next((column for column in columns if column.table is table), key)
