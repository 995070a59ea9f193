"""What a measurement says of itself, as text for the terminal and as Markdown for the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    head: Row
    rows: Sequence[Row]

    def text(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])

    def markdown(self) -> str:
        rule = tuple("---" for _ in self.head)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.head, rule, *self.rows))


@dataclass(frozen=True, slots=True)
class Target:
    """What was promised, and what came of it."""

    what: str
    target: str
    measured: str
    holds: bool

    def row(self) -> Row:
        return self.what, self.target, self.measured, "yes" if self.holds else "**no**"


TARGETS_HEAD = ("what", "target", "measured", "holds")


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    tables: Sequence[Table]
    targets: Sequence[Target] = field(default=())
    remarks: Sequence[str] = field(default=())
    load: tuple[float, float] | None = None
    """Load averages of the last minute, before and after."""

    def text(self) -> str:
        parts = [f"== {self.title}", *(table.text() for table in self.tables), *self.remarks]
        if self.load is not None:
            parts.append(f"load average {self.load[0]:.2f} before, {self.load[1]:.2f} after")
        return "\n\n".join(parts) + "\n"

    def markdown(self) -> str:
        parts = [f"### {self.title}", *(table.markdown() for table in self.tables), *self.remarks]
        if self.load is not None:
            parts.append(f"Load average {self.load[0]:.2f} before, {self.load[1]:.2f} after.")
        return "\n\n".join(parts)


def milliseconds(seconds: float) -> str:
    value = seconds * 1_000
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} ms"
