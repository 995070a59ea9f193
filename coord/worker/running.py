"""Running tasks for arq: how an attempt begins, and which of its many ends it has come to."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arq.worker import JobExecutionFailed, Retry, RetryJob

from coord.jobs.attempt import ATTEMPT, Attempt
from coord.jobs.tracing import continued
from coord.jobs.transaction import JobSuperseded
from coord.retryable import is_retryable
from coord.worker.claims import AGAIN, GONE, LATER
from coord.worker.endings import Endings, can_be_told, one_line
from coord.worker.hooks import call

if TYPE_CHECKING:
    from arq.cron import CronJob
    from arq.worker import Function
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.worker.claims import Claim
    from coord.worker.hooks import Hook
    from coord.worker.pickup import Pickup

logger = logging.getLogger("arq.coord")

UNLIMITED = 10.0**9
"""Seconds, and tries, that arq itself allows: an attempt's limits are coord's to keep."""


@dataclass(frozen=True, slots=True)
class Limits:
    attempts: int
    """How many a job has that says nothing else."""
    timeout: float
    """Seconds of an attempt that says nothing else."""
    idle: float
    """Seconds that a job's transaction may do nothing."""


class Runner:
    """Runs what arq starts."""

    def __init__(
        self,
        session_maker: async_sessionmaker[AsyncSession],
        pickup: Pickup,
        limits: Limits,
        *,
        worker_lock: int,
        on_job_start: Hook | None = None,
    ) -> None:
        self._session_maker = session_maker
        self._pickup = pickup
        self._endings = Endings(session_maker)
        self._limits = limits
        self._worker_lock = worker_lock
        self._on_job_start = on_job_start

    async def run(self, function: Function | CronJob, ctx: dict[Any, Any], args: Any, kwargs: Any) -> Any:
        claim = self._pickup.claims.get(ctx["job_id"])
        if claim is None:
            raise RuntimeError(f"job {ctx['job_id']} was not claimed")
        claim.task = asyncio.current_task()
        if claim.message is None:
            return await self._without_ledger(function, ctx, args, kwargs)
        attempt = claim.attempt = ctx[ATTEMPT] = self._attempt(claim, function.max_tries)
        try:
            try:
                await call(self._on_job_start, ctx)
                with continued(_sound(claim.message.trace)):
                    await self._limited(function, attempt, ctx, args, kwargs)
            except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:  # noqa: BLE001 - it is the task's, and is recorded
                await self._failed(claim, attempt, error)
            else:
                await self._returned(claim, attempt)
        except asyncio.CancelledError:
            await self._cancelled(claim, attempt)

    async def _without_ledger(self, function: Function | CronJob, ctx: dict[Any, Any], args: Any, kwargs: Any) -> Any:
        """arq's own affair, but for the limits, which arq was not told of."""
        most = function.max_tries or self._limits.attempts
        if ctx["job_try"] > most:
            raise JobExecutionFailed(f"max {most} retries exceeded")
        await call(self._on_job_start, ctx)
        async with asyncio.timeout(function.timeout_s or self._limits.timeout):
            return await function.coroutine(ctx, *args, **kwargs)

    def _attempt(self, claim: Claim, attempts: int | None = None) -> Attempt:
        assert claim.message is not None
        assert claim.job_id is not None
        return Attempt(
            job_id=claim.job_id,
            message=claim.message,
            session_maker=self._session_maker,
            attempts=attempts or self._limits.attempts,
            worker_lock=self._worker_lock,
            idle_limit=self._limits.idle,
        )

    def give_up(self, claim: Claim) -> None:
        """Of a task that nobody has known for a quarter of an hour."""
        claim.attempt = self._attempt(claim)
        claim.task = asyncio.create_task(self._given_up(claim, claim.attempt))

    def cancel(self, job_id: str) -> None:
        """Somebody wants the job cancelled."""
        claim = self._pickup.claims.get(job_id)
        if claim is not None and claim.message is not None and claim.task is not None and not claim.unwanted:
            claim.unwanted = True
            claim.task.cancel()

    async def _limited(
        self, function: Function | CronJob, attempt: Attempt, ctx: dict[Any, Any], args: Any, kwargs: Any
    ) -> None:
        own = attempt.message.timeout or function.timeout_s or self._limits.timeout
        try:
            async with asyncio.timeout(own) as limit:
                await function.coroutine(ctx, *args, **kwargs)
        except TimeoutError as error:
            if limit.expired():
                raise AttemptTimeoutError(f"the attempt took longer than {own:g} s") from error
            raise

    async def _given_up(self, claim: Claim, attempt: Attempt) -> None:
        error = LookupError(f"no worker knows the task {attempt.message.task}")
        logger.error("Job %s fails: %s", claim.id, error)
        ending = LATER
        try:
            await self._endings.failed(attempt, error)
            ending = GONE
        finally:
            self._pickup.end(claim, ending)

    async def _returned(self, claim: Claim, attempt: Attempt) -> None:
        claim.task = None
        if not attempt.applied and not await self._endings.done(attempt):
            self._superseded(claim)
        claim.ending = GONE

    def _superseded(self, claim: Claim) -> None:
        assert claim.message is not None
        claim.ending = GONE
        logger.info("%s:%s attempt %d superseded", claim.id, claim.message.task, claim.message.attempt)

    async def _cancelled(self, claim: Claim, attempt: Attempt) -> None:
        task = asyncio.current_task()
        assert task is not None
        if attempt.applied:
            claim.ending = GONE  # it was too late
        elif claim.unwanted:
            task.uncancel()
            await self._unwanted(claim, attempt)
        elif task.cancelling():
            claim.ending = AGAIN  # the worker stops: another may begin at once, and no attempt is used up
            raise asyncio.CancelledError
        else:
            await self._failed(claim, attempt, RuntimeError("the task has cancelled itself"))

    async def _unwanted(self, claim: Claim, attempt: Attempt) -> None:
        if await self._endings.cancelled(attempt):
            claim.ending = GONE
            logger.info("%s:%s cancelled", claim.id, attempt.message.task)
        else:
            self._superseded(claim)

    async def _failed(self, claim: Claim, attempt: Attempt, error: BaseException) -> None:
        claim.task = None
        if attempt.applied:
            logger.error("%s:%s has failed after its effect was applied", claim.id, attempt.message.task)
            claim.ending = GONE
            raise _told_to_arq(error)
        if _is_superseded(error):
            return self._superseded(claim)
        if claim.unwanted:
            return await self._unwanted(claim, attempt)
        if not isinstance(error, Retry | RetryJob) and not is_retryable(error):
            if not await self._endings.failed(attempt, error):
                return self._superseded(claim)
            claim.ending = GONE
            raise _told_to_arq(error)
        pause = (getattr(error, "defer_score", None) or 0) / 1000 if isinstance(error, Retry | RetryJob) else None
        wait = await self._endings.again(attempt, error, pause)
        if wait is None:
            return self._superseded(claim)
        claim.ending = GONE  # and the next attempt was handed over by itself
        if wait == math.inf:
            raise _told_to_arq(error)
        raise Retry(defer=wait) from error


def _sound(trace: dict[Any, Any] | None) -> dict[str, str] | None:
    """What propagators can read: whoever can write to Redis must not be able to fail a job by its trace."""
    return trace if trace and all(isinstance(value, str) for value in trace.values()) else None


def _is_superseded(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(JobSuperseded) is not None
    return isinstance(error, JobSuperseded)


def _told_to_arq(error: BaseException) -> Exception:
    """What arq logs as a failure, whatever it was that the task has raised."""
    if isinstance(error, Exception) and not isinstance(error, Retry | RetryJob) and can_be_told(error):
        return error
    told = RuntimeError(one_line(error))
    told.__cause__ = error
    return told


class AttemptTimeoutError(Exception):
    """The attempt took longer than it may."""
