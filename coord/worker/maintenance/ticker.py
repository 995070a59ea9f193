"""Periodic tasks: every worker makes the jobs of its schedules, and the ledger has each slot once."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, case, exists, func, or_, select, true, update
from sqlalchemy.dialects.postgresql import insert as insert_into
from sqlalchemy.orm import Session

from coord.jobs.bulk import insert, note, row_of
from coord.jobs.enqueue import job_of
from coord.jobs.ids import slot_id
from coord.jobs.model import execute, is_queued, jobs, schedules
from coord.jobs.periodic import Periodic
from coord.session import create_db_context
from coord.worker.maintenance.loops import Loop
from coord.worker.state import WorkerState

LOOK_SECONDS = 30.0
"""Between two looks at most, and until the ledger is told again that the schedules are in the code."""
EXPECTED_SECONDS = 0.005
"""For a slot to be there."""
MAX_SLOTS = 100
"""Of one schedule in a round, so that those after it are not late while it catches up."""


class Ticker(Loop):
    """Each job is made in a transaction of its own. `clock` is PostgreSQL's."""

    def __init__(self, state: WorkerState, clock: Any = None) -> None:
        super().__init__(state)
        self._context = create_db_context(state.config.session_maker)
        self._queue = queue = state.keys.queue
        self._schedules = {each.name(queue): each for each in state.config.periodic}
        self._clock = func.clock_timestamp() if clock is None else clock
        self._said_at = float("-inf")

    async def round(self) -> float:
        found = select(self._clock.label("now"), schedules.c.name, schedules.c.slot)
        mine = schedules.c.name.in_([*self._schedules])
        nothing = select(true().label("is")).subquery()
        rows = await self._state.read(found.select_from(nothing.outerjoin(schedules, mine)))
        known = [row for row in rows if row.name is not None]
        if time.monotonic() - self._said_at >= LOOK_SECONDS or len(known) < len(self._schedules):
            await self._say_seen()
        now: datetime = rows[0].now
        has_more = False
        for row in known:
            schedule = self._schedules[row.name]
            due = await asyncio.to_thread(schedule.due, row.slot, now)
            has_more |= len(due) > MAX_SLOTS
            for slot in due[:MAX_SLOTS]:
                await self._make(schedule, row.name, slot)
        if has_more:
            return 0.0
        coming = [moment for each in self._schedules.values() if (moment := each.next(now)) is not None]
        seconds = min([(moment - now).total_seconds() for moment in coming], default=LOOK_SECONDS)
        return min(seconds + EXPECTED_SECONDS, LOOK_SECONDS)

    async def _say_seen(self) -> None:
        """That these are in the code; what is new begins now."""
        values = [{"name": name, "queue": self._queue, "slot": self._clock} for name in sorted(self._schedules)]
        statement = insert_into(schedules).values(values)
        seen = statement.on_conflict_do_update(index_elements=[schedules.c.name], set_={"seen_at": func.now()})
        await self._state.execute(seen)
        self._said_at = time.monotonic()

    async def _make(self, schedule: Periodic, name: str, slot: datetime) -> None:
        own = {"id": slot_id(name, slot), "queue": schedule.call.options.queue or self._queue}
        async with self._context() as session:
            await session.run_sync(_make, schedule, own, {"schedule": name, "moment": slot})


def _make(session: Session, schedule: Periodic, own: dict[str, Any], values: dict[str, Any]) -> None:
    """Unless the slot was dealt with: the job, or nothing if it would overlap."""
    given = values | {"overlap": schedule.overlap, "job": own["id"]}
    last = execute(session, _advance, given).one_or_none()
    if last is None or last.job_id != own["id"]:
        return
    row = row_of(schedule.call, **own)
    stored = insert(session, [row]).get(row["id"])
    if stored is not None:
        note(session, job_of(row, schedule.call.arguments, stored))


_is_unfinished = exists().where(is_queued, jobs.c.id == schedules.c.job_id)
_is_free = or_(bindparam("overlap", type_=true().type), ~_is_unfinished)
_advance = (
    update(schedules)
    .where(schedules.c.name == bindparam("schedule"), schedules.c.slot < bindparam("moment"))
    .values(
        slot=bindparam("moment"),
        job_id=case((_is_free, bindparam("job", type_=schedules.c.job_id.type)), else_=schedules.c.job_id),
    )
    # A worker that is stopped in the middle must not keep the row from the others.
    .returning(schedules.c.job_id, func.set_config("idle_in_transaction_session_timeout", "5s", True))
)
