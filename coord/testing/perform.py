"""One task, run as a worker runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coord.database.engine import session_of
from coord.jobs.enqueue import enqueue
from coord.jobs.options import TaskOptions, name_of
from coord.testing.attempts import attempting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from arq.worker import Function

    from coord.database.engine import AnySession
    from coord.jobs.model import Job
    from coord.jobs.options import Task


async def perform(
    task: Task[...] | TaskOptions[...] | Function,
    /,
    *args: Any,
    session: AnySession,
    ctx: Mapping[Any, Any] | None = None,
    **kwargs: Any,
) -> Job:
    """Enqueue `task(ctx, *args, **kwargs)` and run its first attempt, in the session's transaction; commits nothing.

    What the session has pending is flushed first, since the task reads with a session of its own on its connection: the
    `job_transaction` is a savepoint there. The arguments go through JSON, the job has its row, and claim, limits,
    retries and results are the worker's. A delay is not waited for. `ctx` is what `on_startup` of your worker leaves
    for tasks.

        job = await perform(fulfil_order, order.id, session=coord_session)
        assert job.state == JobState.DONE

    Returns the finished job, with what the task returned as its `result` if that is JSON. Raises what the task has
    raised, as it is: then the ledger says whether the job has failed, or is queued for another attempt, which
    `drain_jobs` runs. An attempt that may not apply its effect raises `JobSuperseded`. With a unique key that an
    unfinished job has, it is that job which runs. What your session has loaded is as it was: `refresh` it.
    """
    function = task.task if isinstance(task, TaskOptions) else task
    if isinstance(function, str):
        raise TypeError(f"perform runs a function, and {function!r} is only the name of one")
    name_of(function)
    with attempting(session, [function], ctx) as attempts:
        await session_of(session).flush()
        async with attempts.sessions() as own:
            job = await enqueue(own, task, *args, **kwargs)
            await own.commit()
        ended = await attempts.run(job.id)
    if ended.error is not None:
        raise ended.error
    return ended.job
