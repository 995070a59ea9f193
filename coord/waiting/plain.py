"""Rows of plainly mapped classes, read by the driver alone: the ORM takes longer for a row than PostgreSQL does.

Plain is a class whose rows are its table's columns and nothing else: no inheritance, no SQL expressions, nobody who
listens to its being loaded. Its types, keys and schemas are SQLAlchemy's as ever. Whatever else there is, errors above
all, is left to the ORM, which then reads in its own way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import Table, inspect
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from coord.hints.changes import Changes
from coord.postgresql.flushing import note_statement
from coord.target import column_names

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import asyncpg
    from sqlalchemy import Engine, PoolProxiedConnection, Select
    from sqlalchemy.engine import Dialect
    from sqlalchemy.orm import Mapper

    from coord.postgresql.schemas import Schemas
    from coord.target import ColumnNames, Key

    Processors = Sequence[Callable[[Any], Any] | None]

_KNOWN = "coord.plain"
"""What a pooled connection knows: its statements by their queries, as long as those are kept."""
_ANY_SESSION = Session()
_EVENTS = ("begin", "engine_connect", "set_connection_execution_options", "before_execute", "before_cursor_execute")
"""Of an engine, in which statements are seen and rewritten, or schemas and roles are set for them."""


def is_plain(mapper: Mapper[Any], engine: Engine) -> bool:
    """Whether to read it so is to read it as the ORM would; somebody may begin to listen at any time."""
    dispatch: Any = _ANY_SESSION.dispatch
    return (
        _has_plain_columns(mapper)
        and not mapper.class_manager.dispatch.load
        and not any(getattr(engine.dispatch, name) for name in _EVENTS)
        and all(each is note_statement for each in engine.dialect.dispatch.do_execute)
        and not dispatch.after_begin
        and all(isinstance(getattr(each, "__self__", None), Changes) for each in dispatch.do_orm_execute)
    )


@lru_cache(maxsize=256)
def _has_plain_columns(mapper: Mapper[Any]) -> bool:
    return (
        mapper.inherits is None
        and mapper.polymorphic_on is None
        and isinstance(mapper.persist_selectable, Table)
        and column_names(mapper) == tuple(each.key for each in mapper.column_attrs)
        and all(len(each.columns) == 1 for each in mapper.column_attrs)
    )


class Query:
    """A statement with parameters for keys, which selects the position of each and then columns of a table."""

    def __init__(self, statement: Select[Any], schemas: Schemas, dialect: Dialect) -> None:
        under: Mapping[str, Any] = (
            {"schema_translate_map": dict(schemas), "render_schema_translate": True} if schemas else {}
        )
        compiled: Any = statement.compile(dialect=dialect, **under)
        self._sql = str(compiled)
        self._names: Sequence[str] = compiled.positiontup
        kinds = [compiled.binds[name].type.dialect_impl(dialect) for name in self._names]
        self._given = [kind.bind_processor(dialect) for kind in kinds]
        self._kinds = [
            each.type.dialect_impl(dialect) for each in compiled._result_columns
        ]  # pinned by tests/test_plain.py
        self._dialect = dialect

    def rows(self, engine: Engine, parameters: Mapping[str, Any]) -> list[Sequence[Any]] | None:
        """In a greenlet of SQLAlchemy's, outside any transaction; None if that has failed, for whatever reason."""
        pooled = engine.raw_connection()
        try:
            return self._rows(pooled, parameters)
        except Exception:  # noqa: BLE001 - the ORM, which is asked then, says it in its own words
            # PostgreSQL has perhaps prepared the statement, which asyncpg has not said to be over, and keeps its locks.
            pooled.invalidate()
            return None
        except BaseException:
            pooled.invalidate()
            raise
        finally:
            pooled.close()

    def _rows(self, pooled: PoolProxiedConnection, parameters: Mapping[str, Any]) -> list[Sequence[Any]]:
        pairs = zip(self._names, self._given, strict=True)
        given = [parameters[name] if process is None else process(parameters[name]) for name, process in pairs]
        known: dict[Query, tuple[Any, Processors]] = pooled.info.setdefault(_KNOWN, WeakKeyDictionary())
        if self not in known:
            driver: Any = pooled.driver_connection
            statement = await_only(driver.prepare(self._sql))
            known[self] = (statement, self._processors(statement))
        statement, processors = known[self]
        rows: list[asyncpg.Record] = await_only(statement.fetch(*given))
        if not any(processors):
            return [tuple(row) for row in rows]
        return [tuple(p(v) if p else v for p, v in zip(processors, row, strict=True)) for row in rows]

    def _processors(self, statement: Any) -> Processors:
        """What makes the driver's values SQLAlchemy's: it hangs on the types, which may have changed since."""
        oids = [each.type.oid for each in statement.get_attributes()]
        return [kind.result_processor(self._dialect, oid) for kind, oid in zip(self._kinds, oids, strict=True)]


def detached(mapper: Mapper[Any], names: ColumnNames, values: Sequence[Any]) -> Any:
    """An instance as the ORM would have loaded it, in no session."""
    instance = mapper.class_manager.new_instance()
    state = inspect(instance)
    state.dict.update(zip(names, values, strict=True))
    key: Key = tuple(state.dict[mapper.get_property_by_column(each).key] for each in mapper.primary_key)
    state.key = mapper.identity_key_from_primary_key(key)
    return instance
