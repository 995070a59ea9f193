"""What ends a wait or a stream before its time: the client disconnects, or the server stops.

At SIGTERM and SIGINT a server waits for its open requests before its shutdown event, so coord handles them itself.
Nothing has to be set up, and a mounted application, whose lifespan no server runs, learns of the signal as well.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from coord.cancellation import uninterrupted

Stopped = asyncio.Future[None]

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, None once the server stops, `ClientDisconnect` once the client has left; it has ended then.

    Reads the rest of the request meanwhile, so it comes after the body; where a middleware hides the disconnect,
    the work goes on to its own end.
    """
    with stop_observed() as stopped:
        task, left = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
        ends: set[asyncio.Future[Any]] = {task, left, stopped}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if left.done() and not task.done():
                raise ClientDisconnect
            return task.result() if task.done() else None
        finally:
            await uninterrupted(ended(task, left))
            del task, ends  # its error would refer to itself, by its traceback and this frame


async def _disconnected(request: Request) -> None:
    try:
        while (await request.receive())["type"] != "http.disconnect":
            pass
    except Exception:  # noqa: BLE001 - who cannot be asked has not left
        await asyncio.get_running_loop().create_future()


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel those that still run, and return when all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Handlers:
    """Of the signals, before those of others, from the first observer to the last."""

    def __init__(self) -> None:
        self.observers: set[Stopped] = set()
        self.received = False
        self._before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def remove(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:  # else another handler was set meanwhile
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = True
        for observer in [*self.observers]:
            observer.get_loop().call_soon_threadsafe(_resolve, observer)
        if callable(handler := self._before[number]):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


_installed: list[_Handlers] = []
"""None or one: a process has one handler a signal."""


@contextmanager
def stop_observed() -> Iterator[Stopped]:
    """A future that is done once the process was signalled to stop while any such block was open.

    Signals reach the main thread alone: for an event loop in another one it is never done.
    """
    stopped = asyncio.get_running_loop().create_future()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    if not _installed:
        _installed.append(_Handlers())
    handlers = _installed[0]
    handlers.observers.add(stopped)
    if handlers.received:
        stopped.set_result(None)
    try:
        yield stopped
    finally:
        handlers.observers.discard(stopped)
        if not handlers.observers:
            _installed.remove(handlers)
            handlers.remove()


def _resolve(stopped: Stopped) -> None:
    if not stopped.done():
        stopped.set_result(None)
