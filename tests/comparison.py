"""The figures of the comparison page are the round trip's: `python -m tests.comparison --write` copies them."""

from __future__ import annotations

import re
import sys

from tests.shop import ROOT

ROUND_TRIP = ROOT / "docs" / "roundtrip.md"
PAGE = ROOT / "docs" / "comparison.md"
MODES = ("ROW EXCLUSIVE", "SHARE ROW EXCLUSIVE")
BEGIN = "<!-- what follows is written by python -m tests.comparison --write, from roundtrip.md -->\n"
END = "<!-- until here -->"
HEAD = (
    "| contender | alone, p50: ROW EXCLUSIVE | SHARE ROW EXCLUSIVE "
    "| at once, requests/s: ROW EXCLUSIVE | SHARE ROW EXCLUSIVE | keeps |"
)


def figures(mode: str) -> dict[str, dict[str, str]]:
    """By contender, the cells of the table that the benchmark has written for this lock mode."""
    section = re.search(rf"^### {mode}: .*?\n\n(\|.*?)\n\n", ROUND_TRIP.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None, f"roundtrip.md has no table for {mode}"
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section[1].splitlines()]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def block() -> str:
    beside, excluding = map(figures, MODES)
    rows = [
        f"| {name} | {one['alone: p50']} | {other['alone: p50']} | {one['at once: requests/s']} "
        f"| {other['at once: requests/s']} | {one['keeps']} |"
        for name, one in beside.items()
        if (other := excluding.get(name)) is not None
    ]
    return "\n".join([f"{BEGIN}\n{HEAD}", "| --- | --- | --- | --- | --- | --- |", *rows, "", END])


def written() -> str:
    """The page with the figures of today's benchmark."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{block()}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written())
    print(block())
