"""Queued jobs as maintenance reads them: first which there are, and then their rows, little at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Integer, Row, cast, func, select, tuple_

from coord.jobs.model import is_in_feed, jobs
from coord.worker.state import WorkerState

PAGE = 1_000
"""Jobs whose ids are read at once."""
MAX_ROWS, MAX_BYTES = 200, 1_000_000
"""Of what is read at once with its arguments, which are counted as they are stored."""

remaining = func.extract("epoch", jobs.c.scheduled_at - func.clock_timestamp()).label("remaining")
"""Seconds until a job is due, by PostgreSQL's clock."""
_size = cast(func.pg_column_size(jobs.c.arguments), Integer).label("size")
_names = ("id", "attempt", "task", "arguments", "timeout", "deaths", "trace", "one_at_a_time", "priority")
message_columns = [jobs.c[name] for name in _names]
"""What makes a job's message, and its place in the feed."""
_order = (jobs.c.scheduled_at, jobs.c.id)


class QueuedJobs:
    """Of the worker's queue, without those that wait for their turn."""

    def __init__(self, state: WorkerState) -> None:
        self._read = state.read
        self._in_queue = is_in_feed & (jobs.c.queue == state.keys.queue)

    async def ids(
        self, *conditions: ColumnElement[bool], limit: int = PAGE, after: Row[Any] | None = None
    ) -> Sequence[Row[Any]]:
        """The eldest that fulfil the conditions, with their sizes; those after one of an earlier answer."""
        statement = select(jobs.c.id, jobs.c.attempt, jobs.c.scheduled_at, _size).where(self._in_queue, *conditions)
        if after is not None:
            statement = statement.where(tuple_(*_order) > (after.scheduled_at, after.id))
        return await self._read(statement.order_by(*_order).limit(limit))

    async def rows(self, found: Sequence[Row[Any]]) -> AsyncIterator[Sequence[Row[Any]]]:
        """What makes messages of them, and the seconds that remain."""
        for batch in _batches(found):
            statement = select(*message_columns, remaining).where(
                self._in_queue, jobs.c.id.in_([row.id for row in batch])
            )
            yield await self._read(statement.order_by(*_order))

    async def count(self, *conditions: ColumnElement[bool]) -> int:
        rows = await self._read(select(func.count()).select_from(jobs).where(self._in_queue, *conditions))
        return int(rows[0][0])


def _batches(found: Sequence[Row[Any]]) -> Iterator[list[Row[Any]]]:
    batch: list[Row[Any]] = []
    size = 0
    for row in found:
        if batch and (len(batch) >= MAX_ROWS or size + row.size > MAX_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row.size
    if batch:
        yield batch
