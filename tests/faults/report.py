"""The matrix as it is printed after a run, and as the page for users has it."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from tests.faults.matrix import FAULTS, PARTS, cells
from tests.shop import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pytest

PAGE = ROOT / "docs" / "faults.md"
MARK = "<!-- what follows is written by python -m tests.faults --write -->\n"
GREEN, RED, NONE, NOT_RUN = "✓", "✗", "–", "·"
WIDTH = 8


def lines(signs: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """Parts across, faults down."""
    left = max(map(len, FAULTS)) + 1
    yield " " * left + "".join(short.rjust(WIDTH) for short in PARTS.values())
    for fault in FAULTS:
        yield fault.ljust(left) + "".join(signs[part, fault].rjust(WIDTH) for part in PARTS)


class Report:
    """A plugin of pytest's: remembers how each test ended, and prints the matrix. Exits 1 unless all is green."""

    def __init__(self) -> None:
        self._outcomes: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        passed = report.passed or (report.when != "call" and not report.failed)
        self._outcomes[report.nodeid] = self._outcomes.get(report.nodeid, True) and passed

    @property
    def signs(self) -> dict[tuple[str, str], str]:
        found = {}
        for key, cell in cells():
            outcomes = [self._outcomes.get(f"tests/{test}") for test in cell.tests]
            if not cell.is_tried:
                found[key] = NONE
            elif False in outcomes:
                found[key] = RED
            else:
                found[key] = NOT_RUN if None in outcomes else GREEN
        return found

    @property
    def is_green(self) -> bool:
        return {*self.signs.values()} <= {GREEN, NONE}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        signs = self.signs
        terminalreporter.section("the fault matrix")
        for line in lines(signs):
            terminalreporter.line(line, red=RED in line, green=RED not in line and GREEN in line)
        count = {sign: [*signs.values()].count(sign) for sign in (GREEN, RED, NOT_RUN, NONE)}
        tests = len(self._outcomes)
        terminalreporter.line(
            f"{count[GREEN]} cells hold, {count[RED]} do not, {count[NOT_RUN]} were not run, by {tests} tests;"
            f" {count[NONE]} have none, and docs/faults.md says why"
        )


def page() -> str:
    """What is written on the page beneath its prose."""
    found = [*cells()]
    tried = {key: GREEN if cell.is_tried else NONE for key, cell in found}
    parts = [MARK, "| fault |" + "".join(f" {part} |" for part in PARTS), "| --- |" + " --- |" * len(PARTS)]
    parts += [f"| {fault} |" + "".join(f" {tried[part, fault]} |" for part in PARTS) for fault in FAULTS]
    for fault, row in groupby(found, lambda item: item[0][1]):
        of_fault = [(part, cell) for (part, _), cell in row]
        parts += ["", f"## {fault[0].upper()}{fault[1:]}", "", "| part | what a user observes |", "| --- | --- |"]
        parts += [f"| {part} | {cell.observed} |" for part, cell in of_fault if cell.is_tried]
        reasons: dict[str, list[str]] = {}
        for part, cell in of_fault:
            if not cell.is_tried:
                reasons.setdefault(cell.reason, []).append(part)
        for reason, names in reasons.items():
            parts += ["", f"Not tried for {', '.join(names)}. {reason}"]
    return "\n".join(parts) + "\n"


def write() -> None:
    prose, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(prose + page())
