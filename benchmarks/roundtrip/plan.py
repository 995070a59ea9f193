"""Who plays when: floor, coord, and coord as it is seen, in alternating pairs; rounds of the others between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.roundtrip.catalogue import COORD, FLOOR, SEEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.roundtrip.catalogue import Entry

SIDE_BY_SIDE, EXCLUSIVE = "ROW EXCLUSIVE", "SHARE ROW EXCLUSIVE"
MODES = SIDE_BY_SIDE, EXCLUSIVE


@dataclass(frozen=True, slots=True)
class Step:
    entry: Entry
    mode: str
    number: int
    """Of the pair, or of the round."""


def planned(entries: Sequence[Entry], pairs: int, rounds: int) -> list[Step]:
    """`rounds` are spread evenly over the pairs; the order within a pair and within a round is never the same."""
    pair = [entry for entry in (FLOOR, COORD, SEEN) if entry in entries]
    others = [entry for entry in entries if entry not in pair]
    if not pair:
        return [step for number in range(rounds) for step in _round(others, number, rounds)]
    steps, played = [], 0
    for number in range(pairs):
        order = pair[:: -1 if number % 2 else 1]
        steps += [Step(entry, mode, number) for mode in MODES for entry in order]
        while played < rounds * (number + 1) // pairs:
            steps += _round(others, played, rounds)
            played += 1
    return steps


def _round(others: Sequence[Entry], number: int, rounds: int) -> list[Step]:
    turned = number * len(others) // rounds
    order = (*others[turned:], *others[:turned])
    return [Step(entry, mode, number) for entry in order for mode in MODES]
