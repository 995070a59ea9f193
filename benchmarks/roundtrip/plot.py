"""One figure: for each lock mode, a request alone and many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.plot import OURS, PLAIN, THEIRS, WHISKER, bars, drawing, logarithmic
from benchmarks.report import milliseconds
from benchmarks.roundtrip.plan import MODES

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.roundtrip.catalogue import Entry
    from benchmarks.roundtrip.findings import Findings, Summary


def draw(path: Path, found: Findings) -> None:
    with drawing(path, len(MODES), 2, squeeze=False) as panels:
        for row, mode in zip(panels, MODES, strict=True):
            summaries = found.summaries(mode)[::-1]
            _alone(row[0], mode, summaries)
            _at_once(row[1], mode, summaries)


def _alone(panel: Any, mode: str, summaries: list[Summary]) -> None:
    middles = [summary.single(0.5) * 1_000 for summary in summaries]
    above = [summary.single(0.99) * 1_000 - middle for summary, middle in zip(summaries, middles, strict=True)]
    _bars(panel, summaries, middles, [milliseconds(middle / 1_000) for middle in middles])
    panel.errorbar(middles, range(len(middles)), xerr=[[0] * len(above), above], **WHISKER)
    logarithmic(panel)
    panel.set(title=f"Alone, {mode}", xlabel="milliseconds, p50 and p99", xlim=(1, 2_000))


def _at_once(panel: Any, mode: str, summaries: list[Summary]) -> None:
    rates = [summary.rate for summary in summaries]
    below = [summary.rate - summary.rates[0] for summary in summaries]
    above = [summary.rates[-1] - summary.rate for summary in summaries]
    _bars(panel, summaries, rates, [f"{rate:.0f}" for rate in rates])
    panel.errorbar(rates, range(len(rates)), xerr=[below, above], **WHISKER)
    panel.set(title=f"At once, {mode}", xlabel="requests a second, median and lowest–highest")
    panel.set_yticklabels([])


def _bars(panel: Any, summaries: list[Summary], values: list[float], notes: list[str]) -> None:
    names = [summary.entry.title for summary in summaries]
    bars(panel, names, values, notes, [_colour(summary.entry) for summary in summaries])


def _colour(entry: Entry) -> str:
    return THEIRS if entry.is_peer else OURS if entry.environment == "coord" else PLAIN
