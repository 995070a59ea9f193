"""Run the fast part of the suite on other versions, Pythons and servers, and say in one table what came of it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tests.matrix.environment import SHOWN
from tests.matrix.legs import LEGS, Outcome, run
from tests.matrix.parts import arguments

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Markdown, with the failed tests and what could not be run beneath it."""
    heads = ["leg", "python", *SHOWN, "servers", "passed", "failed", "took"]
    rows = [
        [
            outcome.leg.name,
            *(outcome.versions.get(name, "?") for name in ("python", *SHOWN)),
            outcome.servers or "embedded",
            str(outcome.passed),
            str(len(outcome.failed)),
            f"{outcome.seconds:.0f} s",
        ]
        for outcome in outcomes
        if outcome.not_run is None
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, ["-" * width for width in widths], *rows):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
    for outcome in outcomes:
        yield from (f"{outcome.leg.name}: failed {test}" for test in outcome.failed)
    for outcome in outcomes:
        if outcome.not_run is not None:
            yield f"{outcome.leg.name}: not run: {outcome.not_run}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the legs and run none")
    parser.add_argument("--only", nargs="+", metavar="LEG", choices=[leg.name for leg in LEGS], help="these legs")
    parser.add_argument(
        "--part", choices=["fast", "core"], default="fast", help="core: what stands closest on the versions"
    )
    parser.add_argument("--tests", nargs="+", default=[], help="these files or tests in place of a part")
    parser.add_argument("-n", "--processes", type=int, default=4, help="of pytest, 4 unless given")
    parser.add_argument("--required", action="store_true", help="a leg that cannot be run counts as failed")
    options = parser.parse_args()
    if options.list:
        print("\n".join(leg.name for leg in LEGS))
        return 0
    outcomes = []
    for leg in LEGS:
        if not options.only or leg.name in options.only:
            print(f"{leg.name} ...", file=sys.stderr, flush=True)
            outcomes.append(
                run(leg, arguments(options.part, options.tests, pooled=leg.pooler is not None), options.processes)
            )
    print("\n".join(table(outcomes)))
    passed, failed = sum(one.passed for one in outcomes), sum(len(one.failed) for one in outcomes)
    missing = sum(one.not_run is not None for one in outcomes)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or (options.required and missing) or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
