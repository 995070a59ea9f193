"""Run every cell of the fault matrix and print it: `python -m tests.faults [--write] [ARGUMENT OF PYTEST …]`."""

from __future__ import annotations

import sys

import pytest

from tests.faults.matrix import node_ids
from tests.faults.report import Report, write


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        write()
        return 0
    report = Report()
    status = pytest.main(["-q", *arguments, *node_ids()], plugins=[report])
    return int(status) or int(not report.is_green)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
