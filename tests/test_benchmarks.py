"""The benchmarks still run; what they measure is another matter."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.backlog import stage as backlog
from benchmarks.backlog.report import GROWTH_MIB
from benchmarks.figures import Estimate
from benchmarks.roundtrip import catalogue as roundtrip
from benchmarks.roundtrip.contender import PATIENCE
from benchmarks.roundtrip.environments import PINS
from benchmarks.roundtrip.plan import MODES, planned
from benchmarks.roundtrip.scale import FULL
from benchmarks.roundtrip.targets import TOLERANCE, at_least, at_most
from benchmarks.scaling import limits

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 240
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 30)


def output(benchmark: str) -> str:
    """Of its smoke test."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, error = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes as well
            raise
    assert process.returncode == 0, error
    return out


def titles(text: str) -> list[str]:
    return [line.removeprefix("== ") for line in text.splitlines() if line.startswith("== ")]


@pytest.mark.slow
def test_the_benchmark_of_waiting_prints_every_section() -> None:
    text = output("waiting")
    sections = ["Wake latency", "Waiters, idle", "All rows changed at once", "Writers' throughput", "Targets"]
    assert titles(text) == sections
    assert text.count("load average") == 4
    for package, name in {"fastapi_toolsets": "fastapi-toolsets", "matplotlib": "matplotlib"}.items():
        said = any("Left out" in line and name in line for line in text.splitlines())
        assert said is (importlib.util.find_spec(package) is None)


@pytest.mark.slow
def test_the_benchmark_of_the_round_trip_judges_floor_and_coord_in_both_modes() -> None:
    text = output("roundtrip")
    *modes, ahead, contenders, targets = titles(text)
    assert [title.partition(":")[0] for title in modes] == list(MODES)
    assert [ahead, contenders, targets] == ["Where another is ahead of coord", "Contenders", "Targets"]
    assert text.count("median, 95 %") == 2
    assert "failed" not in text
    assert re.search(r"^coord's waits that were lost, both modes +0 +0 of [\d,]+ +yes$", text, re.MULTILINE)
    assert "roundtrip.md is not rewritten" in text


@pytest.mark.slow
def test_the_benchmark_of_scaling_says_where_its_costs_lead() -> None:
    text = output("scaling")
    assert titles(text) == ["Processes", "Limits"]
    assert "failed" not in text
    assert "requests/s  arithmetic" in text
    assert "scaling.md is not rewritten" in text


@pytest.mark.slow
def test_the_benchmark_of_the_backlog_judges_every_promise() -> None:
    text = output("backlog")
    assert titles(text) == ["A long backlog", "Targets"]
    assert len(re.findall(r" (yes|\*\*no\*\*)$", text, re.MULTILINE)) == 4
    assert re.search(r"^of the highest priority, while they drain +[1-9]", text, re.MULTILINE)
    assert "backlog.md is not rewritten" in text


def test_each_contender_has_its_pins() -> None:
    for entry in roundtrip.ALL:
        assert (PINS / f"{entry.environment}.txt").exists()


def test_rounds_lie_between_alternating_pairs() -> None:
    steps = planned(roundtrip.ALL, pairs=4, rounds=2)
    names = ["floor", "coord", "coord-seen"]
    assert [step.entry.name for step in steps[:12]] == 2 * names + 2 * names[::-1]
    others = [place for place, step in enumerate(steps) if step.entry in roundtrip.OTHERS]
    each = len(roundtrip.OTHERS) * len(MODES)
    assert others == [*range(12, 12 + each), *range(24 + each, 24 + 2 * each)]
    first, second = ([steps[place].entry for place in half] for half in (others[:each], others[each:]))
    assert first != second
    assert sorted(entry.name for entry in first) == sorted(entry.name for entry in second)


def test_a_target_holds_if_it_is_nearly_met_and_the_interval_reaches_it() -> None:
    assert at_most(1.1, Estimate(1.15, 1.09, 1.2))
    assert not at_most(1.1, Estimate(1.15, 1.11, 1.2))
    assert not at_most(1.1, Estimate(1.16, 1.05, 1.2))
    assert at_least(1.0, Estimate(0.95, 0.9, 1.0))
    assert not at_least(1.0, Estimate(0.95, 0.9, 0.99))
    assert not at_least(1.0, Estimate(0.94, 0.9, 1.1))


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("roundtrip", f"{FULL.requests} of them, or as many as begin in {FULL.request_seconds:g} s"),
        ("roundtrip", f"after up to {FULL.think_seconds * 1_000:g} ms of doing nothing"),
        ("roundtrip", f"They run {FULL.warm_seconds:g} s before answers count, and for {FULL.crowd_seconds:g} s"),
        ("roundtrip", f"without an answer within {PATIENCE:g} s"),
        ("roundtrip", f"misses it by no more than {TOLERANCE * 100:g} %"),
        ("backlog", f"{backlog.FULL.later:,} jobs that are scheduled for later"),
        ("backlog", f"while {backlog.FULL.due:,} others that were all due at once drain"),
        ("backlog", f"at the same moment, {backlog.FULL.ahead:g} s after they were written"),
        ("backlog", f"over {backlog.FULL.idle_seconds:g} s, first with an empty"),
        ("backlog", f"after the first {backlog.FULL.warm:,} jobs"),
        ("backlog", f"never grows by more than {GROWTH_MIB} MiB"),
        ("scaling", f"a server of {limits.CORES} cores"),
        ("scaling", f"writes {limits.DISK_BYTES / 1e6:g} MB and flushes {limits.DISK_FLUSHES:,} times a second"),
        ("scaling", f"a network of {limits.NETWORK_BYTES * 8 / 1e9:g} Gbit/s, and that {limits.SHARE} of anything"),
    ],
)
def test_a_page_says_how_it_is_measured(page: str, says: str) -> None:
    assert says in " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
