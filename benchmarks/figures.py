"""Percentiles, and ratios of what was measured in pairs, with their intervals."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}–{self.high:.2f}]"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, between two of them by interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def estimate(values: Sequence[float]) -> Estimate:
    """By bootstrap; the same values give the same estimate."""
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return Estimate(statistics.median(values), percentile(medians, 0.025), percentile(medians, 0.975))


def ratio_of_blocks(those: Sequence[float], to_these: Sequence[float], size: int) -> Estimate:
    """The ratio of the medians of every `size` pairs, over all blocks."""
    starts = range(0, len(to_these) - size + 1, size)
    blocks = [slice(start, start + size) for start in starts]
    return estimate([statistics.median(those[block]) / statistics.median(to_these[block]) for block in blocks])
