"""The statements of waits, made once for each mapped class: making one takes as long as running it.

Those that read rows, and one that compares: what was flushed is not always, in Python, what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    ColumnElement,
    Connection,
    Integer,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    column,
    func,
    literal,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.orm import Mapper, lazyload, undefer, with_polymorphic

from coord.database.place import ledger_options
from coord.database.schemas import Schemas, is_untranslated
from coord.database.target import EAGER, ColumnNames, Key, Target

_DIALECT = asyncpg_dialect()  # type: ignore[no-untyped-call]


def parameters_of(mapper: Mapper[Any], keys: Sequence[Key], *, one: bool) -> dict[str, Any]:
    """For any statement here: the parts of one key, or the arrays of the parts of many."""
    if one and not _is_bound_by_expression(mapper):
        return {f"keys_{n}": value for n, value in enumerate(keys[0])}
    return {f"keys_{n}": list(values) for n, values in enumerate(zip(*keys, strict=True))}


@lru_cache(maxsize=256)
def columns_of(mapper: Mapper[Any], names: ColumnNames, *, one: bool) -> Select[Any]:
    """The position of each key whose row is there, and the named attributes."""
    return _select(mapper, mapper.class_, [getattr(mapper.class_, name) for name in names], one=one)


@lru_cache(maxsize=256)
def entity_of(mapper: Mapper[Any], *, one: bool, identified: bool = False) -> Select[Any]:
    """The row as an instance, and which version it is. A subclass's is loaded with the columns of its own class."""
    entity = _entity(mapper)
    selected = [entity, *(_identity(mapper) if identified else ())]
    return _select(mapper, entity, selected, one=one).options(*_all_columns(mapper))


@lru_cache(maxsize=256)
def identities_of(mapper: Mapper[Any], *, one: bool) -> Select[Any]:
    """Which version of the row there is: another one after every change, and in every other table."""
    return _select(mapper, _entity(mapper), _identity(mapper), one=one)


def options_of(mapper: Mapper[Any], schemas: Schemas, connection: Connection) -> dict[str, Any]:
    """Those under which a statement about the class is executed.

    Told with each execution: an engine's own options, which may be another tenant's, outdo those of a statement.
    """
    return ledger_options(connection) if is_untranslated(mapper) else {"schema_translate_map": dict(schemas) or None}


def has_identity(mapper: Mapper[Any]) -> bool:
    """Whether its rows are kept in tables, as far as the mapping says; one of them may be a view all the same."""
    return all(isinstance(each.persist_selectable, Table) or each.inherits for each in mapper.self_and_descendants)


def _identity(mapper: Mapper[Any]) -> list[ColumnElement[Any]]:
    """System columns (section 5.6 of PostgreSQL's manual) of each table: its place, and who wrote it there.

    The place alone is used again as soon as nobody sees the version that was there.
    """
    names = sorted(
        {
            _DIALECT.identifier_preparer.quote(table.name)
            for each in mapper.self_and_descendants
            for table in each.tables
        }
    )
    return [literal_column(f"{name}.{system}") for name in names for system in ("tableoid", "ctid", "xmin")]


def _entity(mapper: Mapper[Any]) -> Any:
    return mapper.class_ if mapper.polymorphic_on is None else with_polymorphic(mapper.class_, "*")


def _all_columns(mapper: Mapper[Any]) -> list[Any]:
    """Only what makes a difference, since an instance remembers with which options it was loaded."""
    mappers = [*mapper.self_and_descendants]
    eager = any(each.lazy in EAGER for one in mappers for each in one.relationships)
    deferred = any(each.deferred for one in mappers for each in one.column_attrs)
    return [lazyload("*")] * eager + [undefer("*")] * deferred


def _select(mapper: Mapper[Any], source: Any, selected: Sequence[Any], *, one: bool) -> Select[Any]:
    own = [getattr(source, mapper.get_property_by_column(key).key) for key in mapper.primary_key]
    if one and not _is_bound_by_expression(mapper):
        pairs = zip(own, enumerate(mapper.primary_key), strict=True)
        is_it = [mine == cast(bindparam(f"keys_{n}", type_=key.type), key.type) for mine, (n, key) in pairs]
        return select(literal_column("1", Integer), *selected).select_from(source).where(*is_it)
    wanted, match = _wanted(mapper, own)
    return select(wanted.c.position.cast(Integer), *selected).select_from(wanted).join(source, match)


def _wanted(mapper: Mapper[Any], own: Sequence[Any]) -> tuple[Any, ColumnElement[bool]]:
    """The keys as a table, and what matches them: PostgreSQL does, so its notion of equality counts."""
    keys = mapper.primary_key
    arrays = [bindparam(f"keys_{n}", type_=ARRAY(key.type)) for n, key in enumerate(keys)]
    wanted = (
        func.unnest(*arrays)
        .table_valued(*(column(f"key_{n}", key.type) for n, key in enumerate(keys)), with_ordinality="position")
        .render_derived(name="wanted")
    )
    return wanted, and_(*(mine == wanted.c[f"key_{n}"] for n, mine in enumerate(own)))


@lru_cache(maxsize=256)
def _is_bound_by_expression(mapper: Mapper[Any]) -> bool:
    """Whether a key's type has SQL of its own around its values, which the elements of an array go without."""
    return any(key.type.bind_expression(bindparam("key")) is not None for key in mapper.primary_key)


def comparisons_of(target: Target[Any], seen: Mapping[str, Any]) -> Iterator[tuple[Select[Any], dict[str, Any]]]:
    """For each table of the row: whether the values, if they were stored there, would be what is there."""
    by_table: dict[Table, list[str]] = {}
    for name in seen:
        table = target.mapper.columns[name].table
        assert isinstance(table, Table)
        by_table.setdefault(table, []).append(name)
    for table, names in by_table.items():
        keys = {f"key_{n}": part for n, part in enumerate(target.key)}
        values = {f"seen_{n}": seen[name] for n, name in enumerate(names)}
        yield _comparison(target.mapper, table, tuple(names)), keys | values


@lru_cache(maxsize=256)
def _comparison(mapper: Mapper[Any], table: Table, names: ColumnNames) -> Select[Any]:
    """PostgreSQL makes a row of the values, by the very types of the table's columns, and writes both rows out.

    Text is compared, since not every type has an equality, and that of some (box, path) is no equality of values.
    """
    own = table.alias("own")
    columns = [mapper.columns[name] for name in names]
    pairs: list[Any] = []
    for n, each in enumerate(columns):
        pairs += [cast(literal(each.name), Text), _as_json(f"seen_{n}", each)]
    given = func.json_populate_record(own.table_valued(), func.json_build_object(*pairs))
    stored = given.table_valued(*[each.name for each in columns], name="given")
    same = and_(*(cast(stored.c[each.name], Text) == cast(own.c[each.key], Text) for each in columns))
    is_it = [
        own.c[_key_in(mapper, key, table).key] == bindparam(f"key_{n}", type_=key.type)
        for n, key in enumerate(mapper.primary_key)
    ]
    return select(same).select_from(own.join(stored, true())).where(*is_it)


def _as_json(name: str, of: Column[Any]) -> ColumnElement[Any]:
    """What JSON has of a value: PostgreSQL's text for it, which it reads by the column's type; JSON is itself."""
    parameter = bindparam(name, type_=of.type)
    plain = of.type.dialect_impl(_DIALECT)
    if isinstance(plain, JSON):
        return cast(parameter, of.type)
    known = "::" in str(parameter.compile(dialect=_DIALECT))
    return cast(parameter if known else cast(parameter, of.type), Text)


def _key_in(mapper: Mapper[Any], key: ColumnElement[Any], table: Table) -> Any:
    """The column of the table that has this part of the key: a subclass's table has its own."""
    columns: list[Any] = mapper.get_property_by_column(key).columns
    return next((each for each in columns if each.table is table), key)
