"""A process of its own for each measurement, and what a process costs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from benchmarks.waiting.stage import run

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


def resident_bytes() -> int:
    """Of this process; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def postgresql_seconds(postmaster: int) -> float:
    """CPU time of a server so far, that of its ended processes included; Linux only."""
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    total = sum(_ticks(postmaster)[:4])
    for child in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += sum(_ticks(int(child))[:2])
    return total / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> list[int]:
    """User and system time, its own and then its waited-for children's (proc(5), /proc/pid/stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]
