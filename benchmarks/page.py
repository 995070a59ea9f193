"""A page of `docs/`: what was measured goes between two markers, and what was written by hand stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

END = "<!-- until here -->"


def rewrite(page: Path, target: str, measured: str) -> None:
    """Put `measured` in the place of what this target of the Makefile has measured before."""
    marker = f"<!-- what follows is written by make {target} -->"
    before, begin, rest = page.read_text().partition(marker)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has lost its markers, {marker} and {END}")
    page.write_text(f"{before}{begin}\n\n{measured}\n\n{END}{after}")
