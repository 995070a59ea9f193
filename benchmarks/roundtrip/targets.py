"""What was promised of the round trip, rows 1 to 3, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import estimate
from benchmarks.report import Target, milliseconds
from benchmarks.roundtrip.catalogue import COORD
from benchmarks.roundtrip.plan import EXCLUSIVE, MODES, SIDE_BY_SIDE

if TYPE_CHECKING:
    from benchmarks.figures import Estimate
    from benchmarks.roundtrip.findings import Findings, Summary

LATENCY = 1.1
"""At most, by the floor's."""
THROUGHPUT = {SIDE_BY_SIDE: 1.1, EXCLUSIVE: 1.0}
"""At least."""
TOLERANCE = 0.05
"""A target is met by a median that misses it by no more, if the interval reaches it."""


def targets(found: Findings) -> list[Target]:
    if not all(found.pairs(mode) for mode in MODES):
        return []
    latencies = [target for mode in MODES for target in _latency(found, mode)]
    throughputs = [target for mode in MODES for target in _throughput(found, mode)]
    return [*latencies, *throughputs, _lost(found)]


def _latency(found: Findings, mode: str) -> list[Target]:
    ratio = estimate([pair.latency for pair in found.pairs(mode)])
    what = f"one at a time, p50, {mode}"
    told = [Target(what, f"≤ {LATENCY} × the floor", f"{ratio} ×", at_most(LATENCY, ratio))]
    if peers := _peers(found, mode):
        best, ours = min(peers, key=lambda peer: peer.single(0.5)), found.summary(COORD, mode).single(0.5)
        measured = f"{milliseconds(ours)}; {best.entry.title} {milliseconds(best.single(0.5))}"
        told.append(Target(what, "below every peer", measured, ours < best.single(0.5)))
    return told


def _throughput(found: Findings, mode: str) -> list[Target]:
    target = THROUGHPUT[mode]
    ratio = estimate([pair.throughput for pair in found.pairs(mode)])
    what = f"many at once, requests a second, {mode}"
    told = [Target(what, f"≥ {target} × the floor", f"{ratio} ×", at_least(target, ratio))]
    if peers := _peers(found, mode):
        best, ours = max(peers, key=lambda peer: peer.rate), found.summary(COORD, mode).rate
        measured = f"{ours:.0f}; {best.entry.title} {best.rate:.0f}"
        told.append(Target(what, "ahead of every peer", measured, ours > best.rate))
    return told


def _lost(found: Findings) -> Target:
    ours = [found.summary(COORD, mode) for mode in MODES]
    lost, asked = sum(each.lost for each in ours), sum(each.asked for each in ours)
    failed = sum(each.failures.total() + each.wrong for each in ours)
    measured = f"{lost} of {asked:,}" + (f", and {failed} that failed" if failed else "")
    return Target("coord's waits that were lost, both modes", "0", measured, not lost and not failed)


def _peers(found: Findings, mode: str) -> list[Summary]:
    return [summary for summary in found.summaries(mode) if summary.entry.is_peer]


def at_most(target: float, ratio: Estimate) -> bool:
    return ratio.value <= target * (1 + TOLERANCE) and ratio.low <= target


def at_least(target: float, ratio: Estimate) -> bool:
    return ratio.value >= target * (1 - TOLERANCE) and ratio.high >= target
