"""What was found: every turn, and for each contender and mode the figures that a table shows."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from benchmarks.figures import percentile
from benchmarks.roundtrip.catalogue import ALL, COORD, FLOOR
from benchmarks.roundtrip.plan import MODES
from benchmarks.roundtrip.turn import Cost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.roundtrip.catalogue import Entry
    from benchmarks.roundtrip.plan import Step
    from benchmarks.roundtrip.turn import Turn


@dataclass(frozen=True)
class Summary:
    """Of the turns of one contender in one mode; times are seconds, and medians over the turns."""

    entry: Entry
    mode: str
    turns: Sequence[Turn]

    def single(self, share: float) -> float:
        return statistics.median(percentile(turn.single.microseconds, share) for turn in self.turns) / 1e6

    def crowd(self, share: float) -> float:
        return statistics.median(percentile(turn.crowd.microseconds, share) for turn in self.turns) / 1e6

    @cached_property
    def rates(self) -> list[float]:
        """Lowest first."""
        return sorted(turn.rate for turn in self.turns)

    @cached_property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @cached_property
    def cost(self) -> Cost:
        return Cost(*(statistics.median(parts) for parts in zip(*(turn.cost.all for turn in self.turns), strict=True)))

    @cached_property
    def lost(self) -> int:
        return sum(turn.lost for turn in self.turns)

    @cached_property
    def asked(self) -> int:
        return self.lost + sum(turn.answered + turn.failures.total() for turn in self.turns)

    @cached_property
    def failures(self) -> Counter[str]:
        return sum((turn.failures for turn in self.turns), Counter())

    @cached_property
    def wrong(self) -> int:
        return sum(turn.wrong for turn in self.turns)


@dataclass(frozen=True)
class Pair:
    """Two turns that were played one after the other."""

    number: int
    base: Turn
    other: Turn

    @property
    def latency(self) -> float:
        """The other's p50 of one request at a time, by the base's."""
        return self.other.p50 / self.base.p50

    @property
    def throughput(self) -> float:
        return self.other.rate / self.base.rate


class Findings:
    def __init__(self, played: Sequence[tuple[Step, Turn]]) -> None:
        self.played = played

    def turns(self, entry: Entry, mode: str) -> dict[int, Turn]:
        """By the number of their pair or round."""
        return {step.number: turn for step, turn in self.played if step.entry == entry and step.mode == mode}

    def summary(self, entry: Entry, mode: str) -> Summary:
        return Summary(entry, mode, [*self.turns(entry, mode).values()])

    def summaries(self, mode: str) -> list[Summary]:
        """Of all that have played."""
        return [self.summary(entry, mode) for entry in ALL if self.turns(entry, mode)]

    def pairs(self, mode: str, base: Entry = FLOOR, other: Entry = COORD) -> list[Pair]:
        bases, others = self.turns(base, mode), self.turns(other, mode)
        return [Pair(number, bases[number], others[number]) for number in sorted(bases.keys() & others.keys())]

    @cached_property
    def entries(self) -> list[Entry]:
        return [entry for entry in ALL if any(self.turns(entry, mode) for mode in MODES)]

    @cached_property
    def loads(self) -> list[float]:
        return sorted(turn.load for _, turn in self.played)
