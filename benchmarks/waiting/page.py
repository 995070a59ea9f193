"""`docs/benchmarks.md`: what was measured goes between two markers, and the figure beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PAGE = "benchmarks.md"
FIGURE = "waiting-benchmark.svg"
BEGIN = "<!-- what follows is written by make bench-waiting -->"
END = "<!-- until here -->"


def rewrite(page: Path, measured: str) -> None:
    """Put `measured` in the place of what was measured before."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has lost its markers, {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}")
