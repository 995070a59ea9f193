"""Many jobs at once: one statement makes them, with what `enqueue` promises of each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload
from uuid import UUID

from arq.worker import Function
from sqlalchemy import (
    JSON,
    DateTime,
    Double,
    Interval,
    Row,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import insert as insert_into
from sqlalchemy.orm import Session

from coord.cancellation import interruptible
from coord.database.engine import AnySession, session_of
from coord.database.transaction import connection_mutex, expect_commit
from coord.errors import UniqueKeyConflictError
from coord.jobs.arguments import as_it_arrives, check_call, is_same, to_json
from coord.jobs.enqueue import due_of, is_unfinished, job_of, joined, options_given, stored_columns, values_of
from coord.jobs.model import Job, execute, job_mapper, jobs, ledger_engine
from coord.jobs.options import P, Task, TaskOptions
from coord.notify.changes import collect, warn_if_uncoordinated
from coord.telemetry import sending

Key = int | tuple[str, str]

SLICE = 200
"""Calls that are prepared, and jobs that are noted, without a pause for the event loop."""

_types: dict[str, Any] = {name: jobs.c[name].type for name in options_given} | {"trace": JSON}
_more: dict[str, Any] = {"arguments": Text, "moment": DateTime(timezone=True), "delay": Double}
_given = (
    func.json_to_recordset(cast(bindparam("rows", type_=Text), JSON))
    .table_valued(*(column(name, type_) for name, type_ in (_types | _more).items()), name="given")
    .render_derived(with_types=True)
)
_now = func.statement_timestamp()
_delay = _given.c.delay * literal("1 second").cast(Interval)
_values = {name: _given.c[name] for name in _types} | {
    "arguments": cast(_given.c.arguments, JSON),  # the text itself, as `enqueue` stores it
    "created_at": _now,
    "scheduled_at": func.greatest(func.coalesce(_given.c.moment, _now), _now) + _delay,
}
_insert = (
    insert_into(jobs)
    .from_select([*_values], select(*_values.values()))
    .on_conflict_do_nothing()
    .returning(jobs.c.id, *stored_columns)
)
_same_key = (jobs.c.task == _given.c.task) & (jobs.c.unique_key == _given.c.unique_key)
_find = select(jobs).join_from(_given, jobs, _same_key & is_unfinished)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a task, with its options, checked; made by `call`."""

    options: TaskOptions[Any]
    text: str
    arguments: Any
    """As a task is given them: `[args, kwargs]`."""


@overload
def call(task: str | Function, /, *args: Any, **kwargs: Any) -> Call: ...
@overload
def call(task: Task[P] | TaskOptions[P], /, *args: P.args, **kwargs: P.kwargs) -> Call: ...
def call(task: Any, /, *args: Any, **kwargs: Any) -> Call:
    """A call of a task for `enqueue_many`; `TypeError` here, at once, for arguments that `enqueue` would refuse."""
    options = task if isinstance(task, TaskOptions) else TaskOptions(task)
    check_call(options.name, options.task, args, kwargs)
    return Call(options, *as_it_arrives(f"{options.name}: the arguments", [[*args], kwargs]))


async def enqueue_many(session: AnySession, calls: Iterable[Call]) -> list[Job]:
    """Have each call run once this session's transaction has committed; the caller commits.

    As `enqueue` for each, in one statement, and two where there are unique keys. Either all of them are there or none:
    a `UniqueKeyConflictError` leaves no job of the others.

        jobs = await enqueue_many(session, [call(send_letter, customer) for customer in customers])
        await session.commit()

    Returns the jobs in the order of the calls; of those with one unique key, the same job again, as `joined`.
    """
    session = session_of(session)
    ledger_engine(session)
    wanted, rows = [], []
    for each in calls:
        if not isinstance(each, Call):
            raise TypeError(f"calls are made by call(task, ...), and {each!r} was not")
        wanted.append(each)
        rows.append(row_of(each))
        if len(rows) % SLICE == 0:
            await asyncio.sleep(0)
    places = _distinct(wanted)
    async with connection_mutex(session):
        found = await interruptible(session.run_sync(_enqueue, places, wanted, rows))
    warn_if_uncoordinated()
    for number, job in enumerate(found.values()):
        if not job.joined:
            note(session.sync_session, job)
        if number % SLICE == SLICE - 1:
            await asyncio.sleep(0)
    return [found[_key(place, each)] for place, each in enumerate(wanted)]


def row_of(call: Call, **given: Any) -> dict[str, Any]:
    """What the ledger is to store of it, as JSON has it; `given` values take the place of the call's own."""
    due = due_of(call.options)
    moment = due["moment"] and due["moment"].isoformat()
    values = values_of(call.options) | given
    with sending(values["task"], values["queue"], values["id"]) as values["trace"]:
        pass  # its span is of no length
    return values | {"arguments": call.text, "moment": moment, "delay": due["delay"].total_seconds()}


def insert(session: Session, rows: Iterable[dict[str, Any]]) -> dict[UUID, Row[Any]]:
    """What was stored, by id; without those that a unique key, or their id, kept out."""
    text = to_json([row | {"id": str(row["id"])} for row in rows])
    return {stored.id: stored for stored in execute(session, _insert, {"rows": text})}


def note(session: Session, job: Job) -> None:
    """Have it handed over after the commit."""
    collect(session, (job_mapper, (job.id,)), job)
    expect_commit(session, job)


def _key(place: int, call: Call) -> Key:
    """Of two calls with the same, one job is made."""
    options = call.options
    return place if options.unique_key is None else (options.name, options.unique_key)


def _distinct(calls: Sequence[Call]) -> dict[Key, int]:
    """The place of the first call of each."""
    places: dict[Key, int] = {}
    for place, call in enumerate(calls):
        first = calls[places.setdefault(_key(place, call), place)]
        if first.text != call.text and not is_same(first.arguments, call.arguments):
            raise UniqueKeyConflictError(f"two calls of {call.options.name} differ under one unique key")
    return places


def _enqueue(
    session: Session, places: Mapping[Key, int], calls: Sequence[Call], rows: Sequence[dict[str, Any]]
) -> dict[Key, Job]:
    """The jobs that were there, and those that were made; nothing is left of these if there is a conflict."""
    left = dict(places)
    made: list[UUID] = []
    found: dict[Key, Job] = {}
    try:
        while left:
            # Looked for first: to an insert, a job that runs just now is a conflict to wait for.
            if keyed := [rows[place] for key, place in left.items() if isinstance(key, tuple)]:
                text = to_json([{name: row[name] for name in ("task", "unique_key")} for row in keyed])
                for there in execute(session, _find, {"rows": text}).mappings().all():
                    same = there["task"], there["unique_key"]
                    found[same] = joined(there, calls[left.pop(same)].arguments)
            # In one order everywhere: of two that make jobs with the same keys, one waits for the other and not both.
            in_order = sorted(left.values(), key=lambda place: (rows[place]["task"], rows[place]["unique_key"] or ""))
            stored = insert(session, [rows[place] for place in in_order]) if left else {}
            made += stored
            for key, place in [*left.items()]:
                if (new := stored.get(rows[place]["id"])) is not None:
                    found[key] = job_of(rows[place], calls[place].arguments, new)
                    del left[key]
    except UniqueKeyConflictError:
        if made:
            execute(session, delete(jobs).where(jobs.c.id.in_(made)))
        raise
    return found
