"""Pausing a queue: nothing of it is begun until it is resumed, whichever worker lives or starts meanwhile."""

from __future__ import annotations

from sqlalchemy import func, update
from sqlalchemy.dialects.postgresql import insert

from coord.cancellation import interruptible
from coord.database.engine import AnySession, session_of
from coord.jobs.model import execute, queues
from coord.jobs.options import DEFAULT_QUEUE, checked_text


async def pause_queue(session: AnySession, queue: str = DEFAULT_QUEUE) -> None:
    """Have workers take nothing more of the queue, within two seconds of the commit; what runs goes on to its end.

    Joins the session's transaction, and the caller commits, soon: until then nobody looks after the queue. Enqueueing
    goes on, and what is due waits.

        await pause_queue(session)
        await session.commit()
    """
    since = func.clock_timestamp()
    statement = insert(queues).values(name=checked_text("queue", queue), paused_at=since)
    kept = func.coalesce(queues.c.paused_at, since)
    paused = statement.on_conflict_do_update(index_elements=[queues.c.name], set_={"paused_at": kept})
    await interruptible(session_of(session).run_sync(execute, paused))


async def resume_queue(session: AnySession, queue: str = DEFAULT_QUEUE) -> None:
    """Have workers take jobs of the queue again, within two seconds of the commit; as for `pause_queue`."""
    resumed = update(queues).where(queues.c.name == checked_text("queue", queue)).values(paused_at=None)
    await interruptible(session_of(session).run_sync(execute, resumed))
