"""The claims of one worker: which jobs it runs, how many more it may, and how each of them ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from uuid import UUID

    from coord.jobs.attempt import Attempt
    from coord.jobs.feed import Message

GONE = "gone"
"""The job is over, or is no business of this worker's any more."""
AGAIN = "0"
"""Somebody may claim it at once."""
LATER = "1000"
"""Somebody may claim it in a second."""
TOLD = ""
"""Redis knows already."""


@dataclass(slots=True, eq=False)
class Claim:
    """A job that this worker has taken out of Redis and not yet put back."""

    id: str
    score: int
    """As in the queue before it was claimed."""
    message: Message | None = None
    """None of a job that arq has enqueued without a ledger."""
    job_id: UUID | None = None
    ending: str | None = None
    """As it is known before the claim has ended: GONE, or the milliseconds after which somebody may claim it again."""
    attempt: Attempt | None = None
    """Once it runs."""
    task: asyncio.Task[Any] | None = None
    """What runs it, as long as it may be cancelled."""
    unwanted: bool = False
    """Whether somebody has cancelled the job."""


class Claims:
    """Shared with the thread that writes the heartbeat, which only reads."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._by_id: dict[str, Claim] = {}
        self._ended: list[Claim] = []

    @property
    def free(self) -> int:
        return self.slots - len(self._by_id)

    @property
    def has_ended(self) -> bool:
        """Whether Redis has still to be told of an end."""
        return bool(self._ended)

    def get(self, job_id: str) -> Claim | None:
        return self._by_id.get(job_id)

    def all(self) -> list[Claim]:
        """A copy, taken in one step of the interpreter."""
        return list(self._by_id.values())

    def add(self, claim: Claim) -> None:
        self._by_id[claim.id] = claim

    def end(self, claim: Claim, ending: str) -> None:
        """Its slot, if it has one, is free; Redis is told with the next claims."""
        claim.ending = ending
        if self._by_id.get(claim.id) is claim:
            del self._by_id[claim.id]
        if ending != TOLD:
            self._ended.append(claim)

    def take_ended(self) -> list[Claim]:
        ended, self._ended = self._ended, []
        return ended

    def restore_ended(self, ended: list[Claim]) -> None:
        """Redis could not be told; it is told later."""
        self._ended = ended + self._ended
