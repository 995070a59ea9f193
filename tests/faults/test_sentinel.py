"""Redis fails over by Sentinel."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.shop import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.faults, pytest.mark.slow]


async def test_a_failover_by_sentinel_is_got_over(ledger: None, database_url: str, tmp_path: Path) -> None:
    """A job enqueued while nobody was master is done, and one after it; the worker lives."""
    command = [sys.executable, "-m", "tests.faults.sentinel", database_url, str(tmp_path)]
    ended = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0, ended.stderr
