"""Measure what a wait costs and how soon it is woken, and write it into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from benchmarks.loop import installed
from benchmarks.machine import DOCS, machine, sources
from benchmarks.page import rewrite
from benchmarks.report import TARGETS_HEAD, Section, Table
from benchmarks.servers import opened
from benchmarks.waiting import idle, latency, waves, writers
from benchmarks.waiting.plot import draw
from benchmarks.waiting.scale import FULL, QUICK
from benchmarks.waiting.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.waiting.scale import Scale

PAGE = "benchmarks.md"
FIGURE = "waiting-benchmark.svg"
TARGET = "bench-waiting"
SECTIONS: list[tuple[Callable[[Stage, Scale], Any], Callable[[Any, Scale], Section]]] = [
    (latency.measure, latency.report),
    (idle.measure, idle.report),
    (waves.measure, waves.report),
    (writers.measure, writers.report),
]
BENCH_ONLY = {"fastapi_toolsets": "fastapi-toolsets", "matplotlib": "matplotlib"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a minute, whose figures are worth nothing"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where benchmarks.md is")
    options = parser.parse_args(arguments)
    began, code = monotonic(), sources()
    with opened(Stage) as stage:
        where = f"{machine(stage)} Servers, waiters and writers share the cores."
        print(f"{where}\n", flush=True)
        found, sections = _measured(stage, QUICK if options.quick else FULL)
    targets = Table(TARGETS_HEAD, [target.row() for section in sections for target in section.targets])
    print(f"== Targets\n\n{targets.text()}\n\n{monotonic() - began:.0f} s in all")
    if missing := [name for package, name in BENCH_ONLY.items() if not installed(package)]:
        print(f"Left out, since they are not installed: {', '.join(missing)}; make bench-waiting has them")
    if options.quick:
        _try_drawing(found)
    elif missing:
        print(f"{PAGE} is not rewritten: it shows whole runs only")
    elif sources() != code:
        print(f"{PAGE} is not rewritten: processes of this run have started with different code")
    else:
        draw(options.docs / FIGURE, *found)
        parts = ["### Targets", targets.markdown(), where, *(section.markdown() for section in sections)]
        rewrite(options.docs / PAGE, TARGET, "\n\n".join(parts))


def _measured(stage: Stage, scale: Scale) -> tuple[list[Any], list[Section]]:
    found, sections = [], []
    for measure, report in SECTIONS:
        before = os.getloadavg()[0]
        found.append(measure(stage, scale))
        sections.append(replace(report(found[-1], scale), load=(before, os.getloadavg()[0])))
        print(sections[-1].text(), flush=True)
    return found, sections


def _try_drawing(found: list[Any]) -> None:
    if installed("matplotlib"):
        with tempfile.TemporaryDirectory() as directory:
            draw(Path(directory) / FIGURE, *found)


if __name__ == "__main__":
    main()
