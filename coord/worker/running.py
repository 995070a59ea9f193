"""Running tasks for arq: how an attempt begins, and which of its many ends it has come to."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arq.worker import Function, Retry, RetryJob

from coord.jobs.attempt import ATTEMPT, Attempt
from coord.jobs.trace import continued
from coord.jobs.transaction import JobSuperseded
from coord.transient import is_transient
from coord.worker.claims import AGAIN

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.worker.claims import Claim
    from coord.worker.endings import Endings
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
    """Runs what arq starts. A job without a ledger is arq's own affair."""

    def __init__(
        self,
        session_maker: async_sessionmaker[AsyncSession],
        pickup: Pickup,
        endings: Endings,
        limits: Limits,
        worker_lock: int,
    ) -> None:
        self._session_maker = session_maker
        self._pickup = pickup
        self._endings = endings
        self._limits = limits
        self._worker_lock = worker_lock

    async def run(self, function: Function, ctx: dict[str, Any], args: Any, kwargs: Any) -> Any:
        claim = self._pickup.claims.get(ctx["job_id"])
        if claim is None or claim.message is None:
            return await function.coroutine(ctx, *args, **kwargs)
        claim.task = asyncio.current_task()
        attempt = claim.attempt = ctx[ATTEMPT] = self._attempt(claim, function.max_tries)
        try:
            with continued(claim.message.trace):
                await self._limited(function, attempt, ctx, args, kwargs)
            claim.task = None
            if not attempt.applied and not await self._endings.done(attempt):
                self._superseded(claim)
        except JobSuperseded:
            self._superseded(claim)
        except asyncio.CancelledError:
            await self._cancelled(claim, attempt)
        except BaseExceptionGroup as group:
            if group.subgroup(JobSuperseded) is None:
                await self._failed(claim, attempt, group)
            else:
                self._superseded(claim)
        except Exception as error:  # noqa: BLE001 - it is the task's, and is recorded
            await self._failed(claim, attempt, error)

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
        error = LookupError(f"no worker knows the task {claim.attempt.message.task}")
        claim.task = asyncio.create_task(self._given_up(claim, claim.attempt, error))

    def cancel(self, job_id: str) -> None:
        """Somebody wants the job cancelled."""
        claim = self._pickup.claims.get(job_id)
        if claim is not None and claim.task is not None and not claim.unwanted:
            claim.unwanted = True
            claim.task.cancel()

    async def _limited(self, function: Function, attempt: Attempt, ctx: dict[str, Any], args: Any, kwargs: Any) -> None:
        own = attempt.message.timeout or function.timeout_s or self._limits.timeout
        try:
            async with asyncio.timeout(own) as limit:
                await function.coroutine(ctx, *args, **kwargs)
        except TimeoutError as error:
            if limit.expired():
                raise AttemptTimeoutError(f"the attempt took longer than {own:g} s") from error
            raise

    async def _given_up(self, claim: Claim, attempt: Attempt, error: Exception) -> None:
        logger.error("Job %s fails: %s", claim.id, error)
        await self._endings.failed(attempt, error)
        self._pickup.end(claim)

    def _superseded(self, claim: Claim) -> None:
        assert claim.message is not None
        logger.info("%s:%s attempt %d superseded", claim.id, claim.message.task, claim.message.attempt)

    async def _cancelled(self, claim: Claim, attempt: Attempt) -> None:
        task = asyncio.current_task()
        assert task is not None
        if claim.unwanted:
            task.uncancel()
            if attempt.applied or not await self._endings.cancelled(attempt):
                self._superseded(claim)
            else:
                logger.info("%s:%s cancelled", claim.id, attempt.message.task)
        elif task.cancelling():
            claim.ending = "0"  # the worker stops: another may begin at once, and no attempt is used up
            raise asyncio.CancelledError
        else:
            await self._failed(claim, attempt, RuntimeError("the task has cancelled itself"))

    async def _failed(self, claim: Claim, attempt: Attempt, error: Exception | BaseExceptionGroup[Any]) -> None:
        claim.task = None
        if attempt.applied:
            logger.error("%s:%s has failed after its effect was applied", claim.id, attempt.message.task)
            raise error
        pause: float | None = None
        match error:
            case Retry():
                pause = (error.defer_score or 0) / 1000
            case RetryJob():
                pause = 0.0
            case _ if not is_transient(error):
                if not await self._endings.failed(attempt, error):
                    return self._superseded(claim)
                raise error
        wait = await self._endings.again(attempt, error, pause)
        if wait is None:
            return self._superseded(claim)
        if wait == math.inf:
            raise error
        claim.ending = AGAIN
        raise Retry(defer=wait) from error


class AttemptTimeoutError(Exception):
    """The attempt took longer than it may."""
