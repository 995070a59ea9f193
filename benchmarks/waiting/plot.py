"""One figure with a panel for each section."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.figures import percentile
from benchmarks.plot import OURS, PLAIN, THEIRS, WHISKER, bars, drawing, logarithmic
from benchmarks.report import milliseconds
from benchmarks.waiting.idle import UNDECLARED
from benchmarks.waiting.waves import FLUSH, LIMIT, RAW
from benchmarks.waiting.waves import UNDECLARED as WITHOUT
from benchmarks.waiting.writer import Way
from benchmarks.waiting.writers import TARGET, ratio

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.waiting.idle import Idle
    from benchmarks.waiting.latency import Latencies
    from benchmarks.waiting.waves import Waves
    from benchmarks.waiting.writers import Throughput

POINTS = 40
"""Of a curve."""


def draw(path: Path, latencies: Latencies, idle: dict[str, Idle], waves: Waves, throughput: Throughput) -> None:
    with drawing(path, 2, 2) as panels:
        _latencies(panels[0][0], latencies)
        _idle(panels[0][1], idle)
        _waves(panels[1][0], waves)
        _throughput(panels[1][1], throughput)


def _latencies(panel: Any, found: Latencies) -> None:
    values = {_short(way): [second * 1_000 for second in found.all[way]] for way in reversed(found.all)}
    middles = [statistics.median(each) for each in values.values()]
    worst = [percentile(each, 0.99) for each in values.values()]
    _bars(panel, [*values], middles, [milliseconds(middle / 1_000) for middle in middles])
    panel.errorbar(middles, range(len(values)), xerr=[[0] * len(worst), _minus(worst, middles)], **WHISKER)
    logarithmic(panel)
    panel.set(title="Commit → waiter returns", xlabel="milliseconds, p50 and p99", xlim=(0.1, 2_000))


def _idle(panel: Any, found: dict[str, Idle]) -> None:
    shown = {name: idle for name, idle in reversed(found.items()) if name != UNDECLARED}
    each = {f"{name.partition(',')[0]}, {idle.waiters:,} waiters": idle for name, idle in shown.items()}
    rates = [idle.statements_a_second for idle in each.values()]
    notes = [f"{rate:.0f}" for rate in rates]
    _bars(panel, [*each], rates, notes)
    logarithmic(panel)
    panel.set(title="Idle, looked at every 0.5 s", xlabel="statements a second", xlim=(0.1, 2_000))


def _waves(panel: Any, found: Waves) -> None:
    for way, waves in found.items():
        if way.endswith(WITHOUT):
            continue
        wave = sorted(waves, key=lambda answers: answers[-1])[len(waves) // 2]
        shares = [point / POINTS for point in range(POINTS + 1)]
        colour = {RAW: PLAIN}.get(way, OURS)
        style = "--" if way == FLUSH else "-"
        times = [percentile(wave, share) for share in shares]
        panel.plot(times, shares, style, color=colour, label=way.partition(",")[0])
    panel.axvline(LIMIT, color="black", linewidth=0.6, linestyle=":")
    count = len(next(iter(found.values()))[0])
    panel.set(title=f"All {count:,} rows changed at once", xlabel="seconds from the commit", ylabel="share answered")
    panel.set(xlim=(0, 1.2 * LIMIT), ylim=(0, 1))
    panel.legend(loc="center right", framealpha=1, edgecolor="none")


def _throughput(panel: Any, found: Throughput) -> None:
    bars = {
        "asyncpg, NOTIFY trigger": ratio(found.plain, Way.TRIGGER),
        "sessions, NOTIFY trigger": ratio(found.sessions, Way.TRIGGER),
        "coord's sessions, the bell": ratio(found.sessions, Way.BELL),
    }
    values = [bar.value for bar in bars.values()]
    below = [bar.value - bar.low for bar in bars.values()]
    above = [bar.high - bar.value for bar in bars.values()]
    _bars(panel, [*bars], values, [f"{value:.2f}" for value in values])
    panel.errorbar(values, range(len(bars)), xerr=[below, above], **WHISKER)
    panel.axvline(TARGET, color="black", linewidth=0.6, linestyle=":")
    panel.set(title="Writers' throughput", xlabel="share of that with nothing rung", xlim=(0, 1.15))


def _bars(panel: Any, names: list[str], values: list[float], notes: list[str]) -> None:
    bars(panel, names, values, notes, [_colour(name) for name in names])


def _minus(those: list[float], these: list[float]) -> list[float]:
    return [mine - other for mine, other in zip(those, these, strict=True)]


def _colour(name: str) -> str:
    return OURS if name.startswith("coord") else THEIRS if "toolsets" in name or "NOTIFY" in name else PLAIN


def _short(way: str) -> str:
    return way.partition(":")[0].replace("interval ", "")
