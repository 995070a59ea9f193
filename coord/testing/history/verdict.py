"""All rules over a history of any length: what belongs together is looked at together, a part at a time."""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

from coord.testing.history import rules
from coord.testing.history.records import (
    Bounds,
    Calm,
    Complaint,
    FaultSpan,
    LedgerJob,
    Number,
    Operation,
    Outcome,
    from_line,
    to_line,
)
from coord.testing.history.rules import RULES, UNRECORDED, Violation, concerned, grouped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from coord.testing.history.records import Record

MAX_SHOWN = 5
"""Violations of each rule that are kept; the others are counted."""
MAX_IN_MEMORY = 200_000
"""Records; of a longer history so many are in memory at a time, as long as no one row or effect has more."""


@dataclass(slots=True)
class Verdict:
    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Of violations, by rule."""
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    """Of operations."""
    records: Counter[str] = field(default_factory=Counter)
    """Of each kind."""
    checked: set[str] = field(default_factory=lambda: {UNRECORDED})
    """The rules that had something to check."""

    @property
    def holds(self) -> bool:
        return not self.counts

    def add(self, violations: Iterable[Violation]) -> None:
        for violation in violations:
            self.counts[violation.rule] += 1
            if self.counts[violation.rule] <= MAX_SHOWN:
                self.violations.append(violation)

    def __str__(self) -> str:
        """A line for each rule: ✓ it holds, ✗ it is broken, and beneath it by what, · there was nothing to check."""
        lines = []
        for rule, promise in RULES.items():
            count = self.counts[rule]
            if count:
                mark, found = "✗", f"  — broken {'once' if count == 1 else f'{count} times'}"
            else:
                mark, found = ("✓", "") if rule in self.checked else ("·", "  — nothing to check")
            lines.append(f"{mark} {rule:<10}  {promise}{found}")
            for violation in self.violations:
                if violation.rule == rule:
                    lines += [f"    {line}" for line in str(violation).removeprefix(f"{rule}: ").splitlines()]
        return "\n".join(lines)


def check(history: Iterable[Record], bounds: Bounds | None = None) -> Verdict:
    """What of a history breaks which rule. It is iterated several times, so it is a list or a `HistoryFile`."""
    bounds, verdict = bounds or Bounds(), Verdict()
    calm, stops = _setting(history, verdict)
    _each(history, bounds, verdict, calm, stops)
    count = sum(verdict.records.values())
    for effect, records in _groups(history, "effect", count):
        verdict.add(rules.of_effect(effect, records, bounds))
    for row, records in _groups(history, "row", count):
        verdict.add(rules.of_row(row, records))
    verdict.violations.sort(key=lambda violation: [*RULES].index(violation.rule))
    return verdict


def _setting(history: Iterable[Record], verdict: Verdict) -> tuple[float | None, Sequence[FaultSpan]]:
    """When it was calm again, and when nobody could answer."""
    calm, stops = None, []
    for record in history:
        verdict.records[type(record).__name__] += 1
        verdict.checked.update(concerned(record))
        if isinstance(record, Calm):
            calm = record.at
        elif isinstance(record, FaultSpan) and record.stops_clients:
            stops.append(record)
    return calm, sorted(stops, key=lambda stop: stop.began)


def _each(
    history: Iterable[Record], bounds: Bounds, verdict: Verdict, calm: float | None, stops: Sequence[FaultSpan]
) -> None:
    """What can be said of a record alone, and of all of a kind."""
    numbers: dict[str, array[int]] = defaultdict(lambda: array("q"))
    in_the_calm = with_effect = 0
    for record in history:
        match record:
            case Operation():
                verdict.outcomes[record.outcome] += 1
                verdict.add(rules.of_operation(record, bounds, stops))
                if record.effect is not None and record.calm:
                    in_the_calm += 1
                    with_effect += record.outcome is Outcome.DONE
            case LedgerJob() if record.effect is not None:
                verdict.add(rules.of_job(record, bounds, calm))
            case Number():
                numbers[record.sequence].append(record.number)
            case Complaint():
                verdict.add([rules.of_complaint(record)])
            case _:
                pass
    verdict.add(rules.of_all(in_the_calm, with_effect, bounds))
    for sequence, given in numbers.items():
        verdict.add(rules.of_sequence(sequence, sorted(given), partial(_owners, history, sequence)))


def _owners(history: Iterable[Record], sequence: str, number: int) -> str:
    """Looked for when somebody is to be told."""
    given = (record for record in history if isinstance(record, Number))
    return " and to ".join(one.owner for one in given if (one.sequence, one.number) == (sequence, number))


def _groups(history: Iterable[Record], name: str, count: int) -> Iterator[tuple[str, Sequence[Record]]]:
    """What names the same effect, or the same row; a long history goes through files, a part of all names in each."""
    if count <= MAX_IN_MEMORY:
        yield from grouped(history, name).items()
        return
    with ExitStack() as stack:
        parts = [
            stack.enter_context(tempfile.TemporaryFile("w+", prefix="coord-history-"))
            for _ in range(1 + count // MAX_IN_MEMORY)
        ]
        for record in history:
            if (key := getattr(record, name, None)) is not None:
                parts[crc32(key.encode()) % len(parts)].write(to_line(record) + "\n")
        for part in parts:
            part.seek(0)
            yield from grouped(map(from_line, part), name).items()
