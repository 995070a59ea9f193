"""A client's requests, as the history has them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import httpx

from coord.testing.history import Complaint, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from coord.testing.history import Operation, Recorder

SENT = "http11.send_request_headers.started"
PAUSE_SECONDS = (0.5, 5.0)
"""Before a request that was not answered well is sent again, on average, and before any later time at most."""
GIVE_UP_SECONDS = 90.0
IN_THE_CALM = 3
"""Requests of a client that gives up which no fault has met: who has met nothing but faults goes on asking."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What an answer shows: of the effect, as `Effect.value` has it; of a row, its version, 0 if it is not there."""

    effect: str | None = None
    row: str | None = None
    version: int | None = None
    job: str | None = None
    """The job that it names."""


class GaveUp(Exception):
    """A client was not answered well for a minute and a half, and not in the calm either."""


class Visit:
    """One client, who asks one thing at a time: what it asks with `ask` is in the history."""

    def __init__(
        self,
        number: int,
        seed: int,
        http: httpx.AsyncClient,
        recorder: Recorder,
        calm: Callable[[], int | None],
        tell: Callable[[Operation], None],
    ) -> None:
        self.number = number
        """From 0 on."""
        self.random = Random(f"{seed} {number}")
        self._pauses = Random(f"{seed} {number} pauses")  # how often it asks again is no matter of the seed's
        self._http = http
        self._recorder = recorder
        self._calm = calm
        self._tell = tell
        self._in_the_calm = 0

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """`send` it again and again until the answer is a success, or raise `GaveUp`, which is in the history."""
        self._in_the_calm = 0
        until, pause = self._recorder.now() + GIVE_UP_SECONDS, PAUSE_SECONDS[0]
        while True:
            response = await self.send(method, path, **options)
            if response is not None and response.is_success:
                return response
            if self._recorder.now() > until and self._in_the_calm >= IN_THE_CALM:
                answer = "no answer" if response is None else response.status_code
                text = f"client {self.number} gave up {method} {path} after {GIVE_UP_SECONDS:g} s, with {answer}"
                self._recorder.write(Complaint(text, "served"))
                raise GaveUp(text)
            await asyncio.sleep(pause * self._pauses.uniform(0.5, 1.5))
            pause = min(2 * pause, PAUSE_SECONDS[1])

    async def send(
        self,
        method: str,
        path: str,
        *,
        effect: str | None = None,
        deadline: float | None = None,
        shows: Callable[[httpx.Response], Shown | None] | None = None,
        **options: Any,
    ) -> httpx.Response | None:
        """Send a request once, with httpx's options; None if it was not answered.

        `effect` names what is asked for, if it is one: a 202 promises it, any other success claims that it has landed.
        `deadline` is in how many seconds the answer is due. `shows` is called with every answer below 500.
        """
        began, calm, response = self._recorder.now(), self._calm(), None
        shown, outcome = Shown(), Outcome.UNKNOWN

        async def trace(event: str, _info: object) -> None:
            nonlocal began, calm
            if event == SENT:  # all clients are one process, which may have to wait for a processor before
                began, calm = self._recorder.now(), self._calm()

        try:
            response = await self._http.request(method, path, extensions={"trace": trace}, **options)
        except httpx.HTTPError as error:
            answer = type(error).__name__
        else:
            answer = str(response.status_code)
            shown = (response.status_code < 500 and shows and shows(response)) or shown
            outcome = _outcome(response, effect, shown)
        operation = self._recorder.operation(
            f"{method} {path}",
            began,
            outcome,
            answer=answer,
            observer=f"client {self.number}",
            deadline=deadline,
            effect=effect,
            saw=shown.effect,
            row=shown.row,
            version=shown.version,
            job=shown.job,
            calm=calm is not None and calm == self._calm(),
        )
        self._in_the_calm += operation.calm
        self._tell(operation)
        return response


def _outcome(response: httpx.Response, effect: str | None, shown: Shown) -> Outcome:
    if effect is None and (response.is_success or shown.version is not None):
        return Outcome.READ
    if not response.is_success:
        return Outcome.UNKNOWN
    return Outcome.PROMISED if response.status_code == httpx.codes.ACCEPTED else Outcome.DONE
