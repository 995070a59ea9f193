"""The table has every cell, each with a test that exists or a reason, and the page is what the table says."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.faults.cells import CELLS
from tests.faults.matrix import FAULTS, PARTS, cells, node_ids
from tests.faults.report import GREEN, MARK, NONE, PAGE, RED, lines, page
from tests.shop import ROOT


def test_every_part_has_a_cell_under_every_fault_and_no_other_is_there() -> None:
    assert {*CELLS} == {(part, fault) for part in PARTS for fault in FAULTS}


def test_each_cell_has_tests_and_what_they_show_or_a_reason() -> None:
    for key, cell in cells():
        assert bool(cell.reason) is not cell.is_tried, key
        assert bool(cell.observed) is cell.is_tried, key
        assert (cell.observed or cell.reason).endswith("."), key


def test_the_tests_that_the_table_names_are_those_that_are_run() -> None:
    """Each by the name under which pytest reports it: a test with parameters has one for each of them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *node_ids()]
    ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    collected = {line for line in ended.stdout.splitlines() if "::" in line}
    assert collected == {*node_ids()}


def test_every_test_of_a_fault_is_in_the_table() -> None:
    named = {test.partition("[")[0] for test in node_ids()}
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        tree = ast.parse(path.read_text())
        defined = [node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)]
        tests = {f"tests/faults/{path.name}::{name}" for name in defined if name.startswith("test_")}
        assert tests <= named, tests - named


def test_the_page_is_what_the_table_says() -> None:
    _, mark, written = PAGE.read_text().partition(MARK)
    assert mark + written == page(), "python -m tests.faults --write"


def test_the_matrix_fits_a_terminal_of_a_hundred_columns() -> None:
    drawn = [*lines({key: GREEN if cell.is_tried else NONE for key, cell in cells()})]
    assert max(map(len, drawn)) <= 100
    assert len(drawn) == len(FAULTS) + 1
    assert not any(RED in line for line in drawn)
