"""A minute of the storm that `make chaos` drives for as long as one likes."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.chaos.__main__ import run
from tests.chaos.faults import TO_NETWORKS, TO_SERVERS, TO_WORKERS, forecast
from tests.shop import ROOT

SECONDS = 40


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_no_fault_loses_an_order_or_deals_with_it_twice() -> None:
    seed = random.SystemRandom().randrange(2**32)
    with tempfile.TemporaryDirectory(prefix="coord-chaos-", ignore_cleanup_errors=True) as directory:
        report = await run(Path(directory), SECONDS, seed)
    assert not report.broken, f"make chaos SECONDS={SECONDS} SEED={seed}\n{report}"


def test_a_seed_is_a_storm_in_which_everything_happens() -> None:
    assert forecast(60, 1) == forecast(60, 1) != forecast(60, 2)
    assert {fault.kind for fault in forecast(SECONDS, 3)} == {*TO_WORKERS, *TO_SERVERS, *TO_NETWORKS}


@pytest.mark.parametrize("seconds", [600, -600])
def test_a_clock_that_is_put_off_is_so_for_all_who_ask_it_and_measures_time_as_ever(seconds: int) -> None:
    program = "import time; from datetime import UTC, datetime; n = datetime.now(UTC); print(repr(time.time()), "
    program += "repr(n.timestamp()), repr(time.time_ns() / 1e9), isinstance(n, datetime), repr(time.monotonic()))"
    command = [sys.executable, "-m", "tests.chaos.clock", str(seconds), "code", "-q"]
    ended = subprocess.run(command, cwd=ROOT, input=program, capture_output=True, check=True, text=True)
    *shown, is_one, monotonic = ended.stdout.replace(">>>", "").split()
    assert all(abs(float(found) - time.time() - seconds) < 30 for found in shown), ended.stdout
    assert (is_one, abs(float(monotonic) - time.monotonic()) < 30) == ("True", True)
