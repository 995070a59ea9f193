"""Part of a minute of the storm that `make chaos` drives for as long as one likes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pytest

from coord.testing.proof import Fault
from coord.testing.proof.faults import forecast
from tests.chaos.__main__ import run
from tests.clusters import lay
from tests.shop import ROOT

SECONDS = 15
"""In which a dozen faults happen, of most kinds."""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_no_fault_loses_an_order_or_deals_with_it_twice() -> None:
    with tempfile.TemporaryDirectory(prefix="coord-chaos-", ignore_cleanup_errors=True) as directory:
        lay(Path(directory) / "postgresql")
        proof = await run(SECONDS, directory=Path(directory))
    assert proof.holds, f"make chaos SECONDS={SECONDS} SEED={proof.seed}\n{proof}"


def test_a_seed_is_a_storm_in_which_everything_happens() -> None:
    first, again, other = ([*forecast(60, seed, Fault)] for seed in (1, 1, 2))
    assert first == again != other
    assert first == sorted(first)
    assert {strike.kind for strike in forecast(60, 3, Fault)} == {*Fault}
    assert {strike.kind for strike in forecast(60, 3, [Fault.API_KILLED])} == {Fault.API_KILLED}
    assert [*forecast(60, 3, [])] == []


def test_a_storm_may_last_for_days() -> None:
    assert len([*islice(forecast(10.0**6, 1, Fault), 1000)]) == 1000


@pytest.mark.parametrize("seconds", [600, -600])
def test_a_clock_that_is_put_off_is_so_for_all_who_ask_it_and_measures_time_as_ever(seconds: int) -> None:
    program = "import time; from datetime import UTC, datetime; n = datetime.now(UTC); print(repr(time.time()), "
    program += "repr(n.timestamp()), repr(time.time_ns() / 1e9), isinstance(n, datetime), repr(time.monotonic()))"
    command = [sys.executable, "-m", "tests.chaos.clock", str(seconds), "code", "-q"]
    ended = subprocess.run(command, cwd=ROOT, input=program, capture_output=True, check=True, text=True)
    *shown, is_one, monotonic = ended.stdout.replace(">>>", "").split()
    assert all(abs(float(found) - time.time() - seconds) < 30 for found in shown), ended.stdout
    assert (is_one, abs(float(monotonic) - time.monotonic()) < 30) == ("True", True)
