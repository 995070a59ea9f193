"""What must hold, a pure function for each: over one operation, all of one effect, all of one row, or the whole."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coord.testing.history.records import Complaint, Effect, LedgerJob, Number, Operation, Outcome, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from coord.testing.history.records import Bounds, FaultSpan, Record

RULES = {
    "own-effect": "an answer shows the effect that was asked for, as the database has it",
    "stale": "no answer is older than what anybody had been shown before it was asked for",
    "forward": "what one client is shown of a row never goes back",
    "once": "an effect is applied once if a job of it is done, and not at all if none is",
    "lost": "what was acknowledged is there in the end, and so is what was shown",
    "late": "no answer comes later than its deadline allows",
    "final": "every job comes to its end in time after the last fault",
    "sequence": "numbers run from 1 without a gap, and none is given twice",
    "served": "what is asked while everything is up is answered with its effect",
    "invariant": "what the application itself says must hold",
}
"""Each in one sentence, by its name."""
UNRECORDED = "invariant"
"""The application looks itself, and leaves a record only of what it finds."""
ACKNOWLEDGED = (Outcome.DONE, Outcome.PROMISED)


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    message: str
    operations: tuple[Operation, ...] = ()
    """Those that show it."""

    def __str__(self) -> str:
        return "\n".join([f"{self.rule}: {self.message}", *(f"  {operation}" for operation in self.operations)])


def concerned(record: Record) -> Iterator[str]:
    """The rules that have something to check in this record."""
    match record:
        case Operation():
            yield from _concerned_by_operation(record)
        case LedgerJob() if record.effect is not None:
            yield from ("once", "final")
        case Effect():
            yield "once"
        case Number():
            yield "sequence"
        case Complaint():
            yield of_complaint(record).rule
        case _:
            pass


def _concerned_by_operation(operation: Operation) -> Iterator[str]:
    if operation.effect is not None:
        if operation.outcome is Outcome.DONE:
            yield "own-effect"
        if operation.outcome in ACKNOWLEDGED:
            yield "lost"
        if operation.calm:
            yield "served"
    if operation.version is not None:
        yield from ("lost", "stale")
        if operation.observer:
            yield "forward"
    if operation.deadline is not None:
        yield "late"


def of_operation(operation: Operation, bounds: Bounds, stops: Sequence[FaultSpan]) -> Iterator[Violation]:
    """`stops` are the times in which the process that answers stood still, one after the other."""
    if operation.deadline is None:
        return
    stood = 0.0
    for stop in stops[bisect_left(stops, operation.began, key=lambda each: each.ended) :]:
        if stop.began >= operation.ended:
            break
        stood += min(stop.ended, operation.ended) - max(stop.began, operation.began)
    late = operation.ended - operation.began - stood - operation.deadline
    if late > bounds.late:
        yield Violation("late", f"answered {late:.1f} s after its deadline of {operation.deadline:g} s", (operation,))


def of_job(job: LedgerJob, bounds: Bounds, calm: float | None) -> Iterator[Violation]:
    if job.finished is None:
        yield Violation("final", f"job {job.job} of {job.effect} is still {job.state}, in its attempt {job.attempt}")
        return
    took = job.finished - max(job.created, calm or job.created)
    if took > bounds.final:
        last = "the last fault" if calm and calm > job.created else "it was enqueued"
        yield Violation("final", f"job {job.job} of {job.effect} came to its end {took:.1f} s after {last}")


def of_effect(effect: str, records: Sequence[Record], bounds: Bounds) -> Iterator[Violation]:
    """Over all that names one effect."""
    asked = tuple(one for one in records if isinstance(one, Operation))
    applied = [one for one in records if isinstance(one, Effect) and one.times]
    jobs = [one for one in records if isinstance(one, LedgerJob)]
    yield from _once(effect, asked, applied, jobs)
    yield from _own_effect(effect, asked, applied)
    yield from _lost(effect, asked, applied, jobs, bounds)


def _once(
    effect: str, asked: tuple[Operation, ...], applied: Sequence[Effect], jobs: Sequence[LedgerJob]
) -> Iterator[Violation]:
    times, is_done = sum(one.times for one in applied), any(job.state == "done" for job in jobs)
    told = ", ".join(f"job {job.job} is {job.state} after attempt {job.attempt}" for job in jobs) or "it has no job"
    if times > 1:
        yield Violation("once", f"{effect} was applied {times} times; {told}", asked)
    elif times and not is_done:
        yield Violation("once", f"{effect} was applied, but {told}", asked)
    elif not times and is_done:
        yield Violation("once", f"{effect} was not applied, but {told}", asked)


def _own_effect(effect: str, asked: Sequence[Operation], applied: Sequence[Effect]) -> Iterator[Violation]:
    values = {one.value for one in applied}
    for operation in asked:
        if operation.outcome is not Outcome.DONE:
            continue
        if operation.saw is None:
            yield Violation("own-effect", f"{effect} was asked for, and not shown by the answer", (operation,))
        elif values and operation.saw not in values:
            there = " and ".join(map(repr, sorted(values)))
            yield Violation("own-effect", f"{effect} is {there}, and was shown otherwise", (operation,))


def _lost(
    effect: str, asked: tuple[Operation, ...], applied: Sequence[Effect], jobs: Sequence[LedgerJob], bounds: Bounds
) -> Iterator[Violation]:
    acknowledged = tuple(one for one in asked if one.outcome in ACKNOWLEDGED)
    known = {job.job for job in jobs}
    for operation in acknowledged:
        if operation.job is not None and operation.job not in known:
            yield Violation(
                "lost", f"job {operation.job} was named, and is not in the ledger for {effect}", (operation,)
            )
    if not acknowledged or applied:
        return
    ends = {job.state for job in jobs}
    if any(one.outcome is Outcome.DONE for one in acknowledged):
        yield Violation("lost", f"{effect} was answered, and is not there", acknowledged)
    elif not jobs:
        yield Violation("lost", f"{effect} was promised, and has no job", acknowledged)
    elif ends <= {"failed", "cancelled"} and not bounds.may_fail:
        yield Violation("lost", f"{effect} was promised, and its job {' and '.join(sorted(ends))}", acknowledged)


def of_row(row: str, records: Sequence[Record]) -> Iterator[Violation]:
    """Over all that names one row."""
    shown = [(one, one.version) for one in records if isinstance(one, Operation) and one.version is not None]
    shown.sort(key=lambda each: each[0].ended)
    last = max((one.version for one in records if isinstance(one, Row)), default=0)
    yield from _not_there(row, shown, last)
    yield from _forward(row, shown)
    yield from _stale(row, shown)


def _not_there(row: str, shown: Sequence[tuple[Operation, int]], last: int) -> Iterator[Violation]:
    newest = max(shown, key=lambda each: each[1], default=None)
    if newest is not None and newest[1] > last:
        there = f"is in version {last}" if last else "is not there"
        yield Violation("lost", f"{row} was shown in version {newest[1]}, and in the end {there}", (newest[0],))


def _forward(row: str, shown: Sequence[tuple[Operation, int]]) -> Iterator[Violation]:
    before: dict[str, tuple[Operation, int]] = {}
    for operation, version in shown:
        if not operation.observer:
            continue
        earlier = before.get(operation.observer)
        if earlier is not None and earlier[1] > version:
            message = f"{operation.observer} was shown {row} in version {earlier[1]}, and then in version {version}"
            yield Violation("forward", message, (earlier[0], operation))
        else:
            before[operation.observer] = (operation, version)


def _stale(row: str, shown: Sequence[tuple[Operation, int]]) -> Iterator[Violation]:
    """By the newest that anybody had been shown when each operation began."""
    ends: list[float] = []
    newest: list[tuple[Operation, int]] = []
    for operation, version in shown:
        if not newest or version > newest[-1][1]:
            ends.append(operation.ended)
            newest.append((operation, version))
    for operation, version in shown:
        place = bisect_left(ends, operation.began)
        if place and newest[place - 1][1] > version:
            earlier, seen = newest[place - 1]
            if earlier.observer and earlier.observer == operation.observer:
                continue  # it is said to have gone back
            message = f"{row} was shown in version {version} after somebody had been shown version {seen}"
            yield Violation("stale", message, (earlier, operation))


def of_sequence(sequence: str, numbers: Sequence[int], owners: Callable[[int], str]) -> Iterator[Violation]:
    """`numbers` in ascending order; `owners` names those of one number."""
    expected, last = 1, None
    for number in numbers:
        if number == last:
            yield Violation("sequence", f"{sequence} {number} was given twice: to {owners(number)}")
        elif number < 1:
            yield Violation("sequence", f"{sequence} {number} was given to {owners(number)}, and they begin with 1")
        elif number > expected:
            gap = str(expected) if number == expected + 1 else f"{expected} to {number - 1}"
            yield Violation("sequence", f"{sequence} {gap} was given to nobody, and {number} to {owners(number)}")
        expected, last = max(expected, number + 1), number


def of_complaint(complaint: Complaint) -> Violation:
    if complaint.rule in RULES:
        return Violation(complaint.rule, complaint.text)
    return Violation(UNRECORDED, f"{complaint.rule}: {complaint.text}")


def of_all(in_the_calm: int, with_effect: int, bounds: Bounds) -> Iterator[Violation]:
    """Of the requests for an effect, while everything was up."""
    if with_effect < bounds.served * in_the_calm:
        message = f"of {in_the_calm} requests while everything was up, {with_effect} were answered with their effect"
        yield Violation("served", message)


def grouped(records: Iterable[Record], name: str) -> Mapping[str, Sequence[Record]]:
    """Records by what they say under this name, which is `effect` or `row`."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if (key := getattr(record, name, None)) is not None:
            groups[key].append(record)
    return groups
