"""Ids of jobs and workers: UUIDs of version 7 (RFC 9562, section 6.2), which lie in order of time."""

from __future__ import annotations

import hashlib
import os
import time
from datetime import datetime
from uuid import UUID


def new_id() -> UUID:
    """48 bits of milliseconds, 12 of their fraction, 62 random ones."""
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    return _id(milliseconds, (rest << 12) // 1_000_000, os.urandom(8))


def slot_id(schedule: str, slot: datetime) -> UUID:
    """The only one that the job of a schedule's slot has, whoever makes it."""
    return _id(round(slot.timestamp() * 1000), 0, hashlib.sha256(schedule.encode()).digest())


def _id(milliseconds: int, fraction: int, rest: bytes) -> UUID:
    chance = int.from_bytes(rest[:8]) >> 2
    return UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0x2 << 62 | chance)
