"""The sections of the report."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.figures import estimate
from benchmarks.report import Section, Table, milliseconds
from benchmarks.roundtrip.catalogue import COORD
from benchmarks.roundtrip.plan import EXCLUSIVE, MODES, SIDE_BY_SIDE

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.report import Row
    from benchmarks.roundtrip.catalogue import Entry
    from benchmarks.roundtrip.findings import Findings, Summary
    from benchmarks.roundtrip.scale import Scale

TITLES = {
    SIDE_BY_SIDE: "ROW EXCLUSIVE: jobs run side by side",
    EXCLUSIVE: "SHARE ROW EXCLUSIVE: jobs exclude each other",
}
HEAD = (
    "contender",
    "turns",
    "alone: p50",
    "p99",
    "at once: requests/s",
    "lowest–highest",
    "p50",
    "p99",
    "lost",
    "CPU ms a request: requester",
    "worker",
    "PostgreSQL",
    "Redis",
    "keeps",
)
LETTERS = (
    "keeps: A, job and row are committed together or not at all; D, the job outlives the loss of Redis; O, its effect "
    "is applied once, whenever a worker crashes; F, a wait holds no connection."
)
# What is measured, whether less of it is better, and how it is written.
MEASURES: dict[str, tuple[Callable[[Summary], float], bool, Callable[[float], str]]] = {
    "alone, p50": (lambda summary: summary.single(0.5), True, milliseconds),
    "alone, p99": (lambda summary: summary.single(0.99), True, milliseconds),
    "at once, requests/s": (lambda summary: summary.rate, False, "{:.0f}".format),
    "at once, p50": (lambda summary: summary.crowd(0.5), True, milliseconds),
    "at once, p99": (lambda summary: summary.crowd(0.99), True, milliseconds),
    "CPU a request": (lambda summary: sum(summary.cost.all), True, milliseconds),
}


def sections(found: Findings, scale: Scale, versions: dict[Entry, str]) -> list[Section]:
    told = [_mode(found, mode, scale) for mode in MODES]
    if all(found.pairs(mode) for mode in MODES):
        told.append(_ahead(found))
    return [*told, _contenders(found, versions)]


def _mode(found: Findings, mode: str, scale: Scale) -> Section:
    tables = [Table(HEAD, [_row(summary) for summary in found.summaries(mode)])]
    if found.pairs(mode):
        tables.append(_pairs(found, mode))
    at_once = f"at once: {scale.requesters} requesters, each with its next request as soon as it has its answer."
    remarks = [f"alone: one request at a time; {at_once} {LETTERS}", *_trouble(found, mode)]
    return Section(TITLES[mode], tables, remarks=remarks)


def _row(summary: Summary) -> Row:
    return (
        summary.entry.title,
        str(len(summary.turns)),
        *(milliseconds(summary.single(share)) for share in (0.5, 0.99)),
        f"{summary.rate:.0f}",
        f"{summary.rates[0]:.0f}–{summary.rates[-1]:.0f}",
        *(milliseconds(summary.crowd(share)) for share in (0.5, 0.99)),
        f"{summary.lost} of {summary.asked:,}" if summary.lost else "0",
        *(f"{seconds * 1_000:.2f}" for seconds in summary.cost.all),
        summary.entry.guarantees.letters,
    )


def _pairs(found: Findings, mode: str) -> Table:
    head = ("pair", "floor p50", "coord p50", "ratio", "floor requests/s", "coord requests/s", "ratio")
    pairs = found.pairs(mode)
    rows: list[Row] = [
        (
            str(pair.number + 1),
            *(milliseconds(turn.p50) for turn in (pair.base, pair.other)),
            f"{pair.latency:.2f}",
            *(f"{turn.rate:.0f}" for turn in (pair.base, pair.other)),
            f"{pair.throughput:.2f}",
        )
        for pair in pairs
    ]
    ratios = [str(estimate(values)) for values in zip(*((p.latency, p.throughput) for p in pairs), strict=True)]
    return Table(head, [*rows, ("median, 95 %", "", "", ratios[0], "", "", ratios[1])])


def _trouble(found: Findings, mode: str) -> list[str]:
    """What went wrong that no column shows."""
    told = []
    for summary in found.summaries(mode):
        if summary.failures:
            what = "; ".join(f"{count} × {failure}" for failure, count in summary.failures.most_common(3))
            told.append(f"{summary.entry.title}: {summary.failures.total()} of {summary.asked:,} failed: {what}.")
        if summary.wrong:
            told.append(f"{summary.entry.title}: {summary.wrong} orders whose effect was applied never or twice.")
    return told


def _ahead(found: Findings) -> Section:
    rows: list[Row] = []
    for mode in MODES:
        ours = found.summary(COORD, mode)
        for what, (measure, less, written) in MEASURES.items():
            for other in found.summaries(mode):
                mine, theirs = measure(ours), measure(other)
                if theirs < mine if less else theirs > mine:
                    rows.append((mode, what, other.entry.title, written(theirs), written(mine)))
    title = "Where another is ahead of coord"
    if not rows:
        return Section(title, [], remarks=["Nowhere."])
    head = ("mode", "what", "contender", "it", "coord")
    return Section(title, [Table(head, rows)], remarks=["By medians; ranges that overlap are not ranked."])


def _contenders(found: Findings, versions: dict[Entry, str]) -> Section:
    head = (
        "contender",
        "measured with",
        "learns of it by",
        "A: the job is committed with the row",
        "D: outlives the loss of Redis",
        "O: one effect, whatever crashes",
        "F: a wait holds no connection",
    )
    rows: list[Row] = []
    for entry in found.entries:
        kept = entry.guarantees
        rows.append((entry.title, versions[entry], entry.wait, kept.atomic, kept.durable, kept.once, kept.free))
    loads = found.loads
    load = f"Load average before the turns: {loads[0]:.2f}–{loads[-1]:.2f}, median {statistics.median(loads):.2f}."
    return Section("Contenders", [Table(head, rows)], remarks=[load])
