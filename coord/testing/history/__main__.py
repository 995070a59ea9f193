"""Check a history that was written to a file: `python -m coord.testing.history FILE`. Exit status 1 if it is broken."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coord.testing.history.files import HistoryFile
from coord.testing.history.records import Bounds
from coord.testing.history.verdict import check


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m coord.testing.history", description=__doc__)
    parser.add_argument("file", type=Path)
    for name, what in (("late", "seconds after a deadline"), ("final", "seconds for a job"), ("served", "part")):
        default = getattr(Bounds(), name)
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what}, {default:g} unless given")
    parser.add_argument("--may-fail", action="store_true", help="a job may end without its effect")
    options = parser.parse_args()
    bounds = Bounds(late=options.late, final=options.final, served=options.served, may_fail=options.may_fail)
    try:
        verdict = check(HistoryFile(options.file), bounds)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(verdict)
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
