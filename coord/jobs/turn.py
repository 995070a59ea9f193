"""A job's turn (`one_at_a_time`), as far as who cancels it must know: with its row it ends, and another one begins."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import ColumnElement, Integer, Text, cast, exists, func, literal_column

from coord.jobs.model import jobs, workers


def runs_in_turn(expiry: float) -> ColumnElement[bool]:
    """Whether a worker whose heartbeat is not so many seconds old says that it runs the job, whose turn it is."""
    is_alive = workers.c.beat_at > func.clock_timestamp() - timedelta(seconds=expiry)
    attempt = func.json_extract_path_text(workers.c.jobs, cast(jobs.c.id, Text), literal_column("'attempt'"))
    runs = exists().where(is_alive, cast(attempt, Integer) == jobs.c.attempt)
    return jobs.c.turn.is_not_distinct_from(jobs.c.attempt) & runs
