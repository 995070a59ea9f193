"""Where a worker's end begins, and what signals do meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def also_on_signal(call: Callable[[], None]) -> Iterator[None]:
    """Within the block, have SIGTERM and SIGINT call that in the event loop, as well as whatever they did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(call)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _be_nobodys_handler() -> None:
    """A forked child shares the pipe by which the loop learns of signals: one sent to it would stop its parent."""
    if _parents.pop(os.getppid(), None):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


_parents: dict[int, bool] = {}


def guard_forks() -> None:
    """Have children that this process forks from now on take their signals for themselves."""
    if not _parents:
        os.register_at_fork(after_in_child=_be_nobodys_handler)
    _parents[os.getpid()] = True
