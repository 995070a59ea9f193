"""SIGTERM and SIGINT: a server waits for its open requests before its shutdown event, so coord handles them itself.

Nothing has to be set up, and a mounted application, whose lifespan no server runs, learns of the signal as well.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    Stopped = asyncio.Future[None]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _StopSignals:
    """Handles the signals while any block observes them, beside the handlers of others."""

    def __init__(self) -> None:
        self._observers: set[Stopped] = set()
        self._received = False
        self._installed: Any = None
        self._before: dict[int, Any] = {}

    def add(self, observer: Stopped) -> None:
        if not self._observers:
            self._received, self._before = False, {number: signal.getsignal(number) for number in SIGNALS}
            self._installed = partial(self._handle, self._before)
            for number in SIGNALS:
                signal.signal(number, self._installed)
        self._observers.add(observer)
        if self._received:
            observer.set_result(None)

    def discard(self, observer: Stopped) -> None:
        self._observers.discard(observer)
        if not self._observers:
            for number, handler in self._before.items():
                if signal.getsignal(number) is self._installed:  # else another handler was set meanwhile
                    signal.signal(number, handler)

    def _handle(self, before: dict[int, Any], number: int, frame: Any) -> None:
        self._received = True
        for observer in [*self._observers]:
            observer.get_loop().call_soon_threadsafe(_resolve, observer)
        if callable(handler := before[number]):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


_signals = _StopSignals()
"""A process has one handler a signal."""


@contextmanager
def stop_observed() -> Iterator[Stopped]:
    """A future that is done once the process was signalled to stop while any such block was open.

    Signals reach the main thread alone: for an event loop in another one it is never done.
    """
    stopped = asyncio.get_running_loop().create_future()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    _signals.add(stopped)
    try:
        yield stopped
    finally:
        _signals.discard(stopped)


def _resolve(stopped: Stopped) -> None:
    if not stopped.done():
        stopped.set_result(None)
