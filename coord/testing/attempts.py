"""Attempts without a worker: the worker's own executor, in the test's task, on the connection of the test's session."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import select, update

from coord.database.engine import session_of
from coord.jobs.model import Job, execute, jobs, ledger_engine
from coord.queue.message import Message
from coord.testing.rollback import sessions_beside
from coord.timings import ATTEMPT_TIMINGS
from coord.worker.executor import Executor
from coord.worker.finalizer import Finalizer
from coord.worker.maintenance.beat import Board
from coord.worker.running import RunningJobs
from coord.worker.settings import worker_settings
from coord.worker.state import WorkerState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import Executable
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.database.engine import AnySession
    from coord.jobs.attempt import Attempt
    from coord.worker.turns import Turns

T = TypeVar("T")

NOWHERE = "redis://localhost:0"
"""Where settings say that Redis is, to which an attempt has nothing to say."""
NEVER_IDLE = 0.0
"""Seconds after which PostgreSQL ends an idle transaction: the test's is not to end while somebody debugs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An attempt that was run."""

    outcome: str
    error: BaseException | None
    job: Job
    """As it is in the ledger now."""


class _OneWriter(Finalizer):
    """Writes an end once: what cannot be written is told to the test, and not waited out."""

    problem: BaseException | None = None

    async def persist(self, attempt: Attempt, write: Callable[[AsyncSession], Awaitable[T]]) -> T:
        try:
            async with self._context() as session:
                session.info[ATTEMPT_TIMINGS] = attempt.timings
                return await write(session)
        except BaseException as error:
            self.problem = error
            raise


class _OneAtATime:
    """Attempts run one after another: nobody waits for a turn."""

    async def pass_on(self, keys: Any) -> None:
        pass


class Attempts:
    """Runs jobs of the ledger, one after another."""

    def __init__(self, state: WorkerState, ctx: Mapping[Any, Any]) -> None:
        self.tasks = state.config.tasks
        self.sessions: async_sessionmaker[AsyncSession] = state.config.session_maker
        self._finalizer = _OneWriter(state, lambda _seconds: None)
        self._executor = Executor(state, self._finalizer, cast("Turns", _OneAtATime()), ctx)

    async def run(self, job_id: UUID) -> Ended:
        """The job's next attempt, whether or not it is due, from its message to its end in the ledger."""
        job = await self._job(job_id)
        if job.one_at_a_time is not None:
            async with self.sessions.begin() as session:
                await session.run_sync(execute, update(jobs).where(jobs.c.id == job_id).values(turn=jobs.c.attempt))
        message = Message.read(Message.of(job).text().encode())
        running = self._executor.admit(message)
        outcome = await self._executor.run(running)
        if self._finalizer.problem is not None:
            raise self._finalizer.problem
        return Ended(outcome=outcome, error=running.attempt.error, job=await self._job(job_id))

    async def rows(self, statement: Executable) -> Sequence[Any]:
        async with self.sessions() as session:
            return (await session.run_sync(execute, statement)).all()

    async def _job(self, job_id: UUID) -> Job:
        (row,) = await self.rows(select(jobs).where(jobs.c.id == job_id))
        return job_of(row)


@contextmanager
def attempting(session: AnySession, tasks: Any, ctx: Mapping[Any, Any] | None) -> Iterator[Attempts]:
    """`tasks` are a class that `worker_settings` has made, or functions; `ctx` is what `on_startup` leaves."""
    sessions = sessions_beside(session)
    settings: Any = tasks
    if isinstance(tasks, Iterable) and not isinstance(tasks, str | type):
        settings = worker_settings([*tasks], session_maker=sessions, redis=NOWHERE)
    elif not hasattr(tasks, "worker_config"):
        raise TypeError(f"tasks is a list of functions, or a class that worker_settings has made, not {tasks!r}")
    config = replace(settings.worker_config(), session_maker=sessions, idle_limit=NEVER_IDLE)
    engine, nobody = ledger_engine(session_of(session)), cast("Any", None)
    with closing(Board(1)) as board:
        running = RunningJobs(board, config.tasks)
        yield Attempts(WorkerState(config=config, engine=engine, redis=nobody, board=board, running=running), ctx or {})


def job_of(row: Any) -> Job:
    """A copy of a row of the ledger, in no session."""
    return Job(**{column.name: getattr(row, column.name) for column in jobs.c})
