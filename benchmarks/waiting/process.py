"""A process of its own for each measurement, and the memory of one."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from benchmarks.loop import run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from multiprocessing.connection import Connection

P = ParamSpec("P")
T = TypeVar("T")

PROCESSES = multiprocessing.get_context("spawn")


def apart(function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run it in a process that ends afterwards, so that no measurement inherits memory from another."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_answer, args=(theirs, function, args, kwargs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer: T = ours.recv()
    except EOFError:
        raise SystemExit(f"{function.__module__} failed, as said above") from None
    finally:
        process.join()
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    pipe.send(run(function(*args, **kwargs)))


def resident_bytes(pid: int | str = "self") -> int:
    """Of this process, or another; Linux only."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
