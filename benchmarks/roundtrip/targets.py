"""What was promised of the round trip, rows 1 to 5, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import estimate
from benchmarks.report import Target, milliseconds
from benchmarks.roundtrip.catalogue import COORD, FLOOR, SEEN
from benchmarks.roundtrip.plan import MODES

if TYPE_CHECKING:
    from benchmarks.figures import Estimate
    from benchmarks.roundtrip.findings import Findings, Summary

LATENCY = 1.1
"""At most, by the floor's."""
THROUGHPUT = 1.0
"""At least."""
CPU = 1.1
"""Of worker and Redis together, at most, by the floor's."""
SEEING = 0.05
"""At most, of what a round trip takes without."""
TOLERANCE = 0.05
"""A target is met by a median that misses it by no more, if the interval reaches it."""


def targets(found: Findings) -> list[Target]:
    if not all(found.pairs(mode) for mode in MODES):
        return []
    latencies = [target for mode in MODES for target in _latency(found, mode)]
    throughputs = [target for mode in MODES for target in _throughput(found, mode)]
    costs = [_cpu(found, mode) for mode in MODES]
    seen = [target for mode in MODES if found.pairs(mode, COORD, SEEN) for target in _seen(found, mode)]
    return [*latencies, *throughputs, _lost(found), *costs, *seen]


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
    ratio = estimate([pair.throughput for pair in found.pairs(mode)])
    what = f"many at once, requests a second, {mode}"
    told = [Target(what, f"≥ {THROUGHPUT} × the floor", f"{ratio} ×", at_least(THROUGHPUT, ratio))]
    if peers := _peers(found, mode):
        best, ours = max(peers, key=lambda peer: peer.rate), found.summary(COORD, mode).rate
        measured = f"{ours:.0f}; {best.entry.title} {best.rate:.0f}"
        told.append(Target(what, "ahead of every peer", measured, ours > best.rate))
    return told


def _cpu(found: Findings, mode: str) -> Target:
    costs = (found.summary(entry, mode).cost for entry in (FLOOR, COORD))
    floor, ours = (cost.worker + cost.redis for cost in costs)
    what = f"CPU a request of worker and Redis, {mode}"
    measured = f"{ours / floor:.2f} × ({milliseconds(ours)}, {milliseconds(floor)})"
    return Target(what, f"≤ {CPU} × the floor's", measured, ours <= CPU * floor)


def _seen(found: Findings, mode: str) -> list[Target]:
    pairs = found.pairs(mode, COORD, SEEN)
    latency, rate = estimate([pair.latency for pair in pairs]), estimate([pair.throughput for pair in pairs])
    most, least = 1 + SEEING, 1 - SEEING
    return [
        Target(f"seen, one at a time, p50, {mode}", f"≤ {most} × coord", f"{latency} ×", latency.value <= most),
        Target(f"seen, many at once, {mode}", f"≥ {least} × coord", f"{rate} ×", rate.value >= least),
    ]


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
