"""`coord_lock`, which `create_ledger` installs: the locks of one call, with their deadline, in one statement.

A plpgsql function, since savepoint, SHOW, time-out, LOCK, the time-out as it was and release are six round trips
otherwise, two of them while the table is locked. It runs with the caller's rights.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import ARRAY, DDL, Connection, Float, Select, Text, bindparam, func, quoted_name, select, text
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ProgrammingError

from coord.database.place import ledger_schema
from coord.retryable import sqlstate_of

RECHECK_SECONDS = 10.0
"""After which a database that did not have the function is searched for it again."""

_LOCK = """
CREATE OR REPLACE FUNCTION coord_lock(mode text, names text[], wait_ms double precision) RETURNS text
LANGUAGE plpgsql AS $coord$
DECLARE
    deadline CONSTANT timestamptz := clock_timestamp() + wait_ms * interval '1 millisecond';
    usual CONSTANT text := current_setting('lock_timeout');
    name text;
    key bigint[];
    detail text;
BEGIN
    IF mode !~ '^[A-Z ]+$' THEN
        RAISE EXCEPTION 'coord_lock: % is no lock mode', mode;
    END IF;
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RETURN '25001 ' || current_setting('transaction_isolation');
    END IF;
    FOREACH name IN ARRAY names LOOP
        IF wait_ms > 0 THEN
            PERFORM set_config('lock_timeout',
                greatest(1, ceil(extract(epoch FROM deadline - clock_timestamp()) * 1000))::int::text, true);
        END IF;
        IF mode LIKE 'ADVISORY%' THEN
            key := string_to_array(name, ',')::bigint[];
            EXECUTE format('SELECT pg_advisory_xact_lock%s(%s)', CASE mode WHEN 'ADVISORY' THEN '' ELSE '_shared' END,
                array_to_string(key, ','));
        ELSIF wait_ms = 0 THEN
            EXECUTE format('LOCK TABLE %s IN %s MODE NOWAIT', name::regclass, mode);
        ELSE
            EXECUTE format('LOCK TABLE %s IN %s MODE', name::regclass, mode);
        END IF;
    END LOOP;
    PERFORM set_config('lock_timeout', usual, true);
    RETURN NULL;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
    RETURN SQLSTATE || ' ' || detail;
END
$coord$
"""
"""NULL once every lock is held, else SQLSTATE and detail; then the transaction is as before (section 43.6.8)."""

create_lock_function = DDL(_LOCK.replace("%", "%%"))  # type: ignore[no-untyped-call]
_SCHEMA = text("""
    SELECT nspname FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
    WHERE pg_proc.oid IN (to_regprocedure('coord_lock(text, text[], double precision)'),
            to_regprocedure(quote_ident(CAST(:ledger AS text)) || '.coord_lock(text, text[], double precision)'))
        AND has_function_privilege(pg_proc.oid, 'EXECUTE')
""")
_UNUSABLE = ("42883", "42501", "3F000")
"""The function, or the right to call it, or its schema, is not there any more."""

_found: WeakKeyDictionary[Dialect, Select[Any]] = WeakKeyDictionary()
"""The call, by engine: each has a dialect of its own."""
_missing: WeakKeyDictionary[Dialect, float] = WeakKeyDictionary()
"""When the function was last searched for and not found."""


def lock_function(connection: Connection) -> Select[Any] | None:
    """The call of the function that the connection's database has; searched for once an engine."""
    dialect = connection.dialect
    if (found := _found.get(dialect)) is not None:
        return found
    if monotonic() - _missing.get(dialect, float("-inf")) < RECHECK_SECONDS:
        return None
    schema = connection.scalar(_SCHEMA, {"ledger": ledger_schema(connection)})
    if schema is None:
        _missing[dialect] = monotonic()
        return None
    call = getattr(func, quoted_name(schema, quote=True)).coord_lock(
        bindparam("mode", type_=Text), bindparam("names", type_=ARRAY(Text)), bindparam("wait_ms", type_=Float)
    )
    return _found.setdefault(dialect, select(call))


def call_lock(
    connection: Connection, call: Select[Any], mode: str, names: Sequence[str], limit: float | None
) -> tuple[str, str] | None:
    """SQLSTATE and detail of a refusal; `limit` is in seconds."""
    wait = None if limit is None else limit * 1000
    try:
        answer: str | None = connection.scalar(call, {"mode": mode, "names": list(names), "wait_ms": wait})
    except ProgrammingError as error:
        if sqlstate_of(error) in _UNUSABLE:
            _found.pop(connection.dialect, None)
        raise
    if answer is None:
        return None
    state, _, detail = answer.partition(" ")
    return state, detail
