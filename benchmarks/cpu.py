"""CPU time that processes have used; Linux only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

GONE = FileNotFoundError, ProcessLookupError


def process_seconds(pid: int) -> float:
    """Of all its threads, so far."""
    return sum(_ticks(pid)[:2]) / os.sysconf("SC_CLK_TCK")


def postgresql_seconds(postmaster: int) -> float:
    """Of a server so far, that of its ended processes included."""
    total = sum(_ticks(postmaster)[:4]) / os.sysconf("SC_CLK_TCK")
    for child in Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split():
        with contextlib.suppress(*GONE):
            total += _fine_seconds(int(child))
    return total


def _fine_seconds(pid: int) -> float:
    """Of its one thread: ticks of 10 ms say little about the many processes of a server (sched-stats.rst)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:  # a kernel without it, or the process is gone
        return process_seconds(pid)


def _ticks(pid: int) -> list[int]:
    """User and system time, its own and then its waited-for children's (proc(5), /proc/pid/stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]
