"""Turns: of the jobs with one key one runs at a time, and the others wait in the ledger, in no feed and no slot.

A job's `turn` is 0 while it waits, and the number of the attempt whose turn it is; a unique index has one of those a
key. A turn ends with the attempt: with the commit that ends the job, or that raises the attempt. It is passed on after
that commit, since what waits by then is seen, and what begins to wait later passes it on by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from sqlalchemy import and_, case, exists, func, literal_column, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from coord.jobs.model import is_queued, jobs
from coord.queue.keys import QueueKeys
from coord.queue.message import Message
from coord.worker.maintenance.rows import message_columns, remaining
from coord.worker.state import WorkerState

logger = logging.getLogger("arq.coord")

PASS_SECONDS = 2.0
"""To pass a turn on, after which it is left to the leader."""

_other = jobs.alias("other")
is_waiting = is_queued & (jobs.c.turn == literal_column("0"))


def has_turn(key: Any) -> Any:
    """Whether it is the turn of a job with that key."""
    queued = _other.c.state == literal_column("'queued'")
    return exists().where(queued, _other.c.turn == _other.c.attempt, _other.c.one_at_a_time == key)


_age = tuple_(_other.c.scheduled_at, _other.c.id) < tuple_(jobs.c.scheduled_at, jobs.c.id)
_comes_first = or_(_other.c.priority > jobs.c.priority, and_(_other.c.priority == jobs.c.priority, _age))
_waits = and_(_other.c.state == literal_column("'queued'"), _other.c.turn == literal_column("0"))
_same_key = and_(_other.c.one_at_a_time == jobs.c.one_at_a_time, _other.c.id != jobs.c.id)
_another_is_first = exists().where(_waits, _same_key, _comes_first)


class Turns:
    """One statement is under way at a time: they share a connection."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._mutex = asyncio.Lock()

    async def admitted(self, messages: Sequence[Message]) -> set[tuple[UUID, int]]:
        """The keys of those whose turn it is; the others wait from now on, but for what has ended or is locked."""
        statement = _take([message.key for message in messages])
        found: Sequence[Any] | None = None
        while found is None:
            with suppress(IntegrityError):  # another worker was quicker, and is seen now
                found = await self._all(statement)
        if waiting := {row.one_at_a_time for row in found if not row.turn}:
            await self.pass_on(waiting)  # it may have become free since the statement began
        return {(row.id, row.attempt) for row in found if row.turn}

    async def pass_on(self, keys: Iterable[str]) -> None:
        """Give the turn of each key to the first that waits, if nobody has it, and hand that over; never raises."""
        try:
            async with asyncio.timeout(PASS_SECONDS):
                for key in keys:
                    await self._pass_on(key)
        except Exception as error:  # noqa: BLE001 - the leader does it within seconds
            logger.debug("A turn could not be passed on: %s", error)

    async def _pass_on(self, key: str) -> None:
        with suppress(IntegrityError):  # somebody else has
            for row in await self._all(_pass_on(key)):
                await self._state.hand_over([row], keys=QueueKeys(self._state.keys.namespace, row.queue))

    async def _all(self, statement: Any) -> Sequence[Any]:
        async with self._mutex:
            return await self._state.read(statement)


def _take(keys: Sequence[tuple[UUID, int]]) -> Any:
    """Of each key one job may have the turn: who has it already, or the first, if nobody has it or waits before it."""
    here = is_queued & tuple_(jobs.c.id, jobs.c.attempt).in_(keys)
    found = select(jobs.c.id, jobs.c.one_at_a_time, jobs.c.priority, jobs.c.scheduled_at)
    locked = found.where(here, jobs.c.one_at_a_time.is_not(None)).with_for_update(skip_locked=True).cte("locked")
    by_order = (locked.c.priority.desc(), locked.c.scheduled_at, locked.c.id)
    place = func.row_number().over(partition_by=locked.c.one_at_a_time, order_by=by_order)
    ranked = select(locked.c.id, place.label("place")).cte("ranked")
    is_free = and_(ranked.c.place == 1, ~has_turn(jobs.c.one_at_a_time), ~_another_is_first)
    turn = case((or_(jobs.c.turn == jobs.c.attempt, is_free), jobs.c.attempt), else_=0)
    taken = update(jobs).where(jobs.c.id == ranked.c.id).values(turn=turn)
    return taken.returning(jobs.c.id, jobs.c.attempt, jobs.c.turn, jobs.c.one_at_a_time)


def _pass_on(key: str) -> Any:
    waiting = select(jobs.c.id).where(is_waiting, jobs.c.one_at_a_time == key, ~has_turn(key))
    by_order = (jobs.c.priority.desc(), jobs.c.scheduled_at, jobs.c.id)
    first = waiting.order_by(*by_order).limit(1).with_for_update(skip_locked=True, of=jobs).cte("first")
    passed = update(jobs).where(jobs.c.id == select(first.c.id).scalar_subquery()).values(turn=jobs.c.attempt)
    return passed.returning(*message_columns, jobs.c.queue, remaining)
