"""The bugs: what is changed, in which situation it shows, and by which rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tests.planted import situations
from tests.planted.edits import Edit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.planted.world import World


class Bug(NamedTuple):
    situation: Callable[[World], Awaitable[None]]
    rule: str
    edits: tuple[Edit, ...]


CLAIM = "coord/jobs/job_transaction.py"
EXECUTOR = "coord/worker/executor.py"
SESSION = "coord/session.py"
LOCKS = "coord/locks.py"
ENQUEUE = "coord/jobs/enqueue.py"
RECONCILER = "coord/worker/maintenance/reconciler.py"
WAIT = "coord/waiting/wait.py"
NOT_FENCED = Edit(CLAIM, "    & is_queued\n    & (jobs.c.attempt", "    & (jobs.c.attempt")
ACQUIRED = "    with lock_wait(session, acquisition):\n        acquire(connection, acquisition, limit)\n"
DEFAULT_MODE = "    mode: LockMode | str = LockMode.SHARE_ROW_EXCLUSIVE,\n    timeout: Seconds | str | None = 5.0,\n"
STATE = "        yield row\n"

BUGS = {
    "the answer leaves before the commit": Bug(
        situations.slow_commit,
        "stale",
        (Edit(SESSION, "await before.enter_async_context(_committing", "await after.enter_async_context(_committing"),),
    ),
    "a commit that fails is answered with 2xx": Bug(
        situations.refused_commit,
        "lost",
        (
            Edit(
                SESSION,
                "        await interruptible(session.commit())\n    except",
                "        try:\n            await interruptible(session.commit())\n"
                "        except Exception:\n            await session.rollback()\n    except",
            ),
        ),
    ),
    "a commit after a swallowed error rolls back and says nothing": Bug(
        situations.swallowed_error,
        "lost",
        (Edit("coord/database/engine.py", '    event.listen(connection, "commit", _refuse_failed)\n', ""),),
    ),
    "a claim does not look whether the job has ended": Bug(situations.delivered_twice, "once", (NOT_FENCED,)),
    "a rescue leaves the dead one's transaction": Bug(
        situations.frozen_in_the_block,
        "final",
        (
            Edit(
                "coord/worker/maintenance/rescuer.py",
                "            await end_transactions(connection, worker=worker)\n",
                "",
            ),
        ),
    ),
    "the bell says that a job is done": Bug(
        situations.tried_again,
        "own-effect",
        (Edit("coord/waiting/job_wait.py", "self._owner.read_before(self)", "self._owner.conclude()"),),
    ),
    "a job is handed over before the commit": Bug(
        situations.committed_after_a_while,
        "served",
        (
            Edit(ENQUEUE, "import collect, warn_if", "import _notify, collect, written_to, warn_if"),
            Edit(
                ENQUEUE,
                "    collect(session.sync_session, (job_mapper, (job.id,)), job)\n",
                "    change = {(job_mapper, (job.id,)): job}\n"
                "    _notify(written_to(session.sync_session, job_mapper), session.sync_session, change)\n",
            ),
        ),
    ),
    "a job is done in a transaction after its effect's": Bug(
        situations.killed_after_the_effect,
        "once",
        (
            Edit(CLAIM, 'values(state=bindparam("state"), started_at', "values(state=jobs.c.state, started_at"),
            Edit(
                EXECUTOR,
                "        if not attempt.applied:\n            return await",
                "        if True:\n            return await",
            ),
        ),
    ),
    "a job is done in a transaction before its effect's": Bug(
        situations.killed_in_the_block,
        "once",
        (
            Edit(
                CLAIM,
                "            await interruptible(_claim(session, attempt))\n",
                "            async with attempt.session_maker() as first:\n"
                "                await _claim(first, attempt)\n                await first.commit()\n",
            ),
        ),
    ),
    "a wait starts from the row as it finds it": Bug(
        situations.changed_before_the_wait,
        "served",
        (Edit(WAIT, "baseline, schemas = baseline_of(session, target, since), ", "baseline, schemas = {}, "),),
    ),
    "a job is done although its block was rolled back": Bug(
        situations.error_swallowed_in_the_task,
        "once",
        (Edit(EXECUTOR, "if error is None and attempt.entered and not attempt.applied:", "if False:"),),
    ),
    "a job that is done can be run again": Bug(
        situations.retried_by_hand,
        "once",
        (
            Edit(
                "coord/jobs/queries.py",
                "run_again(session, jobs.c.id == job_id, jobs.c.state.in_(RETRYABLE_STATES))",
                "run_again(session, jobs.c.id == job_id)",
            ),
        ),
    ),
    "the table is not locked": Bug(
        situations.crowd,
        "sequence",
        (Edit(LOCKS, ACQUIRED, ACQUIRED.replace("acquire(connection, acquisition, limit)", "pass")),),
    ),
    "the table is locked and unlocked at once": Bug(
        situations.crowd,
        "sequence",
        (
            Edit(
                LOCKS,
                ACQUIRED,
                "    with lock_wait(session, acquisition), connection.begin_nested() as savepoint:\n"
                "        acquire(connection, acquisition, limit)\n        savepoint.rollback()\n",
            ),
        ),
    ),
    "the default mode does not exclude itself": Bug(
        situations.crowd,
        "sequence",
        (Edit(LOCKS, DEFAULT_MODE, DEFAULT_MODE.replace("SHARE_ROW_EXCLUSIVE", "ROW_EXCLUSIVE")),),
    ),
    "a wait returns the session's row as it was": Bug(
        situations.crowd,
        "own-effect",
        (
            Edit(
                "coord/waiting/session_reader.py",
                "        own: M | None = session.identity_map.get(state.key)\n",
                "        own: M | None = session.identity_map.get(state.key)\n"
                "        if own is not None:\n            return own\n",
            ),
        ),
    ),
    "whoever has a unique key joins whatever job there is": Bug(
        situations.two_keys,
        "own-effect",
        (
            Edit(ENQUEUE, ', jobs.c.unique_key == bindparam("unique_key")\n', "\n"),
            Edit(ENQUEUE, "    if not is_same(job.arguments, arguments):\n", "    if False:\n"),
        ),
    ),
    "what runs is taken for lost, and nothing fences it": Bug(
        situations.longer_than_a_look,
        "once",
        (
            NOT_FENCED,
            Edit(RECONCILER, " or (at is not None and recent < at < ahead)", ""),
            Edit(RECONCILER, "self._note_found(absent, await self._held())", "pass"),
        ),
    ),
    "a reply forgets how long its client waits": Bug(
        situations.longer_than_one_waits,
        "late",
        (
            Edit(
                "coord/http/reply.py",
                "timeout=max(0.0, self.deadline - asyncio.get_running_loop().time()),",
                "timeout=60.0,",
            ),
        ),
    ),
    "nobody compares the ledger with Redis": Bug(
        situations.flushed,
        "final",
        (Edit(RECONCILER, "        if not self._state.is_leader:\n", "        if True:\n"),),
    ),
    "a worker that stops ends its jobs": Bug(
        situations.told_to_stop,
        "lost",
        (
            Edit(
                EXECUTOR,
                "state = await self._finalizer.handed_back(attempt)",
                "state = await self._finalizer.cancelled(attempt)",
            ),
        ),
    ),
    "a stream sends an older state after a newer one": Bug(
        situations.watched,
        "forward",
        (
            Edit(WAIT, "    while True:\n        began", "    earlier = None\n    while True:\n        began"),
            Edit(
                WAIT,
                STATE,
                STATE + "        if earlier is not None:\n            yield earlier\n"
                "        earlier = type(row)(**{name: getattr(row, name) for name in waiter.target.columns})\n",
            ),
        ),
    ),
    "nobody waits for their turn": Bug(
        situations.one_at_a_time,
        "sequence",
        (
            Edit(
                CLAIM,
                "_its_turn = jobs.c.one_at_a_time.is_(None) | (jobs.c.turn == jobs.c.attempt)",
                "_its_turn = jobs.c.id.is_not(None)",
            ),
            Edit("coord/worker/fetcher.py", "                if keyed:\n", "                if False:\n"),
        ),
    ),
    "an attempt that may not apply its effect ends the job": Bug(
        situations.old_message_after_a_retry,
        "once",
        (
            Edit(
                EXECUTOR,
                "return await self._finalizer.cancelled_if_wished(attempt)",
                "return await self._finalizer.done(attempt, None)",
            ),
            Edit("coord/worker/finalizer.py", "    .where(is_ours)\n", '    .where(jobs.c.id == bindparam("job"))\n'),
        ),
    ),
}
STANDARD = (
    "the answer leaves before the commit",
    "a claim does not look whether the job has ended",
    "the table is locked and unlocked at once",
)
"""Those that `make test` runs; `make planted` runs all."""
