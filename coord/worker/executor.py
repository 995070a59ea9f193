"""Running tasks: how an attempt begins, and which of its many ends it has come to."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from arq.worker import Retry, RetryJob

from coord.cancellation import times_cancelled
from coord.jobs.arguments import as_it_arrives
from coord.jobs.attempt import ATTEMPT, Attempt
from coord.jobs.job_transaction import JobSuperseded, worker_lock_key
from coord.jobs.model import JobState
from coord.jobs.options import MAX_SPAN_SECONDS
from coord.observation import PUT_OFF, attempt_ended, observed_attempt
from coord.queue.message import Message
from coord.retryable import is_retryable
from coord.worker.failure import AttemptTimeoutError, one_line, printable
from coord.worker.finalizer import Finalizer
from coord.worker.running import RunningJob
from coord.worker.state import WorkerState
from coord.worker.turns import Turns

logger = logging.getLogger("arq.coord")

NOT_KNOWN, NOT_TAKEN = "is not known here", "does not take these arguments here"
"""In the error of a job that is put off; `coord doctor` reads it."""


class Executor:
    """Runs each attempt in a task of its own, and sees to its end in the ledger."""

    def __init__(self, state: WorkerState, finalizer: Finalizer, turns: Turns, context: Mapping[Any, Any]) -> None:
        self._config = state.config
        self._running = state.running
        self._worker_lock = worker_lock_key(state.id)
        self._finalizer = finalizer
        self._turns = turns
        self._context = context
        self._signatures = {name: inspect.signature(task.coroutine) for name, task in self._config.tasks.items()}
        self._said: set[tuple[str, str]] = set()

    def start(self, message: Message, *, queued: float) -> None:
        running = self.admit(message, queued=queued)
        running.task = asyncio.create_task(self.run(running), name=f"coord job {message.id}")
        running.task.add_done_callback(lambda _task: self._running.remove(running))  # also if it never began

    def admit(self, message: Message, *, queued: float = 0.0) -> RunningJob:
        """Give it a slot, for `run`."""
        attempt = Attempt(
            job_id=message.id,
            task=message.task,
            number=message.attempt,
            arguments=message.arguments,
            timeout=message.timeout,
            session_maker=self._config.session_maker,
            max_attempts=self._config.attempts_of(message.task),
            worker_lock=self._worker_lock,
            idle_limit=self._config.idle_limit,
            queued=queued,
        )
        return self._running.add(message, attempt)

    async def run(self, running: RunningJob) -> str:
        """The whole of an attempt, and its outcome; whatever happens its slot is free afterwards."""
        outcome = "lost"
        try:
            refusal = self._refusal(running.message)
            outcome = await (self._attempted(running) if refusal is None else self._refused(running, refusal))
            if running.message.one_at_a_time is not None and not running.abandoned:
                await self._turns.pass_on([running.message.one_at_a_time])
        except asyncio.CancelledError:
            raise
        except BaseException:
            logger.exception("The end of job %s could not be written", running.message.id)
        finally:
            self._running.remove(running)
            attempt_ended(running.message, outcome, running.attempt.timings, running.attempt.reason)
        return outcome

    def _refusal(self, message: Message) -> Exception | None:
        """Why the attempt cannot be made here, and perhaps by another worker, or by this one after its deployment."""
        signature = self._signatures.get(message.task)
        if signature is None:
            return LookupError(f"the task {message.task} {NOT_KNOWN}")
        try:
            signature.bind(None, *message.args, **message.kwargs)
        except TypeError as error:
            return TypeError(f"the task {message.task} {NOT_TAKEN}: {error}")
        return None

    async def _refused(self, running: RunningJob, error: Exception) -> str:
        running.may_cancel = False
        attempt, what = running.attempt, (running.message.task, str(error))
        attempt.error = error
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s; job %s and others like it go back and stay queued", error, attempt.job_id)
        state = await self._finalizer.unknown(attempt, error, self._config.unknown_after)
        return PUT_OFF if state is JobState.QUEUED else state or "superseded"

    def _ctx(self, running: RunningJob) -> dict[Any, Any]:
        """As arq gives it, and the attempt."""
        message = running.message
        created = message.id.int >> 80  # milliseconds: it is a UUID of version 7
        return {
            **self._context,
            "job_id": str(message.id),
            "job_try": message.attempt,
            "enqueue_time": datetime.fromtimestamp(min(created / 1000, 32_503_680_000), UTC),
            "score": created,
            ATTEMPT: running.attempt,
        }

    async def _attempted(self, running: RunningJob) -> str:
        hooks, attempt, ctx = self._config.hooks, running.attempt, self._ctx(running)
        result: Any = None
        error: BaseException | None = None
        try:
            await hooks["on_job_start"](ctx)
            with observed_attempt(self._config.keys.queue, running.message, attempt.timings):
                result = await self._limited(running, ctx)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as caught:  # noqa: BLE001 - it is the task's, and is recorded
            error = caught
        running.may_cancel = False
        if running.abandoned:
            return "lost"
        await hooks["on_job_end"](ctx)
        if error is None and attempt.entered and not attempt.applied:
            error = attempt.failure or RuntimeError("its job_transaction was not committed")
        outcome = await (self._returned(attempt, result) if error is None else self._raised(running, error))
        await hooks["after_job_end"](ctx)
        return outcome or "superseded"

    async def _limited(self, running: RunningJob, ctx: dict[Any, Any]) -> Any:
        message = running.message
        task = self._config.tasks[message.task]
        limit = message.timeout or task.timeout_s or self._config.job_timeout
        try:
            async with asyncio.timeout(limit) as scope:
                return await task.coroutine(ctx, *message.args, **message.kwargs)
        except TimeoutError as error:
            if scope.expired():
                raise AttemptTimeoutError(f"the attempt took longer than {limit:g} s") from error
            raise

    async def _returned(self, attempt: Attempt, result: Any) -> str | None:
        kept = _as_result(attempt, result)
        if not attempt.applied:
            return await self._finalizer.done(attempt, kept)
        if kept is not None:
            await self._finalizer.keep_result(attempt, kept)
        return JobState.DONE

    async def _raised(self, running: RunningJob, error: BaseException) -> str | None:
        attempt = running.attempt
        attempt.error = error
        if attempt.applied:
            if not isinstance(error, asyncio.CancelledError):
                logger.error("%s has failed after its effect was applied", attempt.task, exc_info=printable(error))
            return JobState.DONE
        if _is_superseded(error):
            return await self._finalizer.cancelled_if_wished(attempt)
        if running.unwanted:
            return await self._finalizer.cancelled(attempt)
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if running.stopping or (is_cancelled and times_cancelled()):
            attempt.reason = None if is_cancelled else one_line(error)
            state = await self._finalizer.handed_back(attempt)
            return "handed back" if state is JobState.QUEUED else state
        if is_cancelled:
            attempt.error = error = RuntimeError("the task has cancelled itself")
        return await self._failed(attempt, error)

    async def _failed(self, attempt: Attempt, error: BaseException) -> str | None:
        asked = isinstance(error, Retry | RetryJob)
        if not asked and not is_retryable(error):
            attempt.reason = one_line(error)
            logger.error("%s: %s", attempt.task, attempt.reason, exc_info=printable(error))
            return await self._finalizer.failed(attempt, error)
        most = 1000 * MAX_SPAN_SECONDS  # PostgreSQL has no later times: what it cannot store would be tried for ever
        pause = min(max(getattr(error, "defer_score", None) or 0, 0), most) / 1000 if asked else None
        counts = asked or attempt.claimed or not attempt.entered  # else PostgreSQL was not to be reached at all
        state = await self._finalizer.again(attempt, error, pause, counts=counts)
        if state is not JobState.QUEUED:
            return state
        attempt.reason = one_line(error)
        return "retried"


def _as_result(attempt: Attempt, result: Any) -> Any:
    """What a task returns is kept if it is JSON."""
    try:
        return None if result is None else as_it_arrives("the result", result)[1]
    except TypeError as error:
        logger.debug("%s: %s", attempt.task, error)
        return None


def _is_superseded(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(JobSuperseded) is not None
    return isinstance(error, JobSuperseded)
