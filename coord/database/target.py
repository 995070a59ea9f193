"""Which row is waited for, and which of its columns: checked before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy import Column, Uuid, inspect
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import Mapper, QueryableAttribute
from sqlalchemy.orm.exc import UnmappedColumnError

M = TypeVar("M")

ColumnNames = tuple[str, ...]
Key = tuple[Any, ...]

EAGER = {"joined", False, "selectin", "subquery", "immediate"}
"""What `relationship(lazy=...)` is of those that are loaded with their row."""


@dataclass(frozen=True, slots=True)
class Target(Generic[M]):
    """One row of a mapped class, by the values of its primary key, and the attributes to compare, in mapping order."""

    mapper: Mapper[M]
    key: Key
    columns: ColumnNames

    @classmethod
    def of(cls, model: type[M], pk_value: object, columns: Sequence[Any] | None) -> Target[M]:
        mapper = mapper_of(model)
        return cls(mapper, key_of(mapper, pk_value), _columns(mapper, columns))

    def __str__(self) -> str:
        return f"{_name(self.mapper)}({', '.join(map(repr, self.key))})"


def mapper_of(model: type[M]) -> Mapper[M]:
    try:
        mapper: Mapper[M] | None = inspect(model)
    except NoInspectionAvailable:
        mapper = None
    if not isinstance(model, type) or not isinstance(mapper, Mapper):
        raise ValueError(f"{model!r} is not a mapped class")  # noqa: TRY004 - an alias or an instance is refused too
    return mapper


@lru_cache(maxsize=256)
def column_names(mapper: Mapper[Any]) -> ColumnNames:
    """The attributes that stand for columns of the mapped tables; SQL expressions are left out."""
    return tuple(
        attribute.key
        for attribute in mapper.column_attrs
        if all(isinstance(column, Column) for column in attribute.columns)
    )


def key_of(mapper: Mapper[Any], pk_value: object) -> Key:
    """Primary key values in the mapper's order, from a value, a tuple, or a mapping by attribute name."""
    values = pk_value
    if isinstance(pk_value, Mapping):
        names = _key_names(mapper)
        if set(pk_value) != set(names):
            raise ValueError(f"pk_value has {sorted(map(str, pk_value))}; the key of {_name(mapper)} is {names}")
        values = tuple(pk_value[name] for name in names)
    elif not isinstance(pk_value, tuple):
        values = (pk_value,)
    assert isinstance(values, tuple)
    if len(values) != len(mapper.primary_key) or not all(map(_is_part, values)):
        names = _key_names(mapper)
        raise ValueError(f"pk_value {pk_value!r} does not give the key of {_name(mapper)}, which is {names}")
    return tuple(_as_loaded(column, value) for column, value in zip(mapper.primary_key, values, strict=True))


def _key_names(mapper: Mapper[Any]) -> list[str]:
    return [mapper.get_property_by_column(column).key for column in mapper.primary_key]


def _is_part(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return value is not None


def _as_loaded(column: Any, value: Any) -> Any:
    """The value as a loaded row has it, so that the session's own instance is found by it."""
    if isinstance(column.type, Uuid) and column.type.as_uuid and isinstance(value, str):
        return UUID(value)
    return value


def _columns(mapper: Mapper[Any], columns: Sequence[Any] | None) -> ColumnNames:
    known = column_names(mapper)
    if columns is None:
        return known
    if isinstance(columns, str) or not isinstance(columns, list | tuple | set | frozenset) or not columns:
        raise ValueError(f"columns is a list of at least one attribute of {_name(mapper)}, not {columns!r}")
    return _in_order(mapper, frozenset(_column(mapper, column, known) for column in columns))


@lru_cache(maxsize=256)
def _in_order(mapper: Mapper[Any], names: frozenset[str]) -> ColumnNames:
    """One tuple for all waits for the same columns, of which there may be thousands."""
    return tuple(name for name in column_names(mapper) if name in names)


def _column(mapper: Mapper[Any], column: object, known: ColumnNames) -> str:
    """An attribute's name, from the name, the attribute, the table's column, or that column's own name."""
    if isinstance(column, QueryableAttribute):
        owned = column.class_ is mapper.class_ or mapper.common_parent(inspect(column.class_))
        name: str | None = column.key if owned else None
    elif isinstance(column, Column):
        name = _attribute_of(mapper, column)
    elif isinstance(column, str) and column not in known and column in mapper.persist_selectable.c:
        name = mapper.get_property_by_column(mapper.persist_selectable.c[column]).key
    else:
        name = column if isinstance(column, str) else None
    if name is None or name not in known:
        raise ValueError(f"{column!s} is not a column of {_name(mapper)}; its columns are {', '.join(known)}")
    return name


def _attribute_of(mapper: Mapper[Any], column: Column[Any]) -> str | None:
    try:
        return mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return None


def _name(mapper: Mapper[Any]) -> str:
    return mapper.class_.__name__
