"""How the benchmarks draw; the same figures make the same file."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OURS, THEIRS, PLAIN = "#1f6f8b", "#d98f3d", "#8a8f98"
WHISKER: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 0.8, "capsize": 2}
STYLE = {
    "svg.hashsalt": "coord",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def drawing(path: Path, rows: int, columns: int, **subplots: Any) -> Iterator[Any]:
    """The panels of a figure, which is saved at the end; `subplots` are matplotlib's options of that name."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        yield figure.subplots(rows, columns, **subplots)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    # matplotlib ends lines with blanks
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def bars(panel: Any, names: list[str], values: list[float], notes: list[str], colours: list[str]) -> None:
    """Each with its note inside, where no whisker is."""
    panel.barh(names, values, color=colours, height=0.6)
    for place, note in enumerate(notes):
        panel.text(0.02, place, note, transform=panel.get_yaxis_transform(), color="white", va="center")


def logarithmic(panel: Any) -> None:
    panel.set_xscale("log")
    panel.minorticks_off()
    panel.xaxis.set_major_formatter("{x:g}")
