"""A minute of the storm that `make chaos` drives for as long as one likes."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

from tests.chaos.__main__ import run
from tests.chaos.faults import TO_SERVERS, TO_WORKERS, forecast

SECONDS = 40
PACE = 25.0
"""Orders a second, of which two busy cores do twice as many."""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_no_fault_loses_an_order_or_deals_with_it_twice() -> None:
    seed = random.SystemRandom().randrange(2**32)
    with tempfile.TemporaryDirectory(prefix="coord-chaos-", ignore_cleanup_errors=True) as directory:
        report = await run(Path(directory), SECONDS, seed, PACE)
    assert not report.broken, f"make chaos SECONDS={SECONDS} SEED={seed} PACE={PACE:g}\n{report}"


def test_a_seed_is_a_storm_in_which_everything_happens() -> None:
    assert forecast(60, 1) == forecast(60, 1) != forecast(60, 2)
    assert {fault.kind for fault in forecast(SECONDS, 3)} == {*TO_WORKERS, *TO_SERVERS}
