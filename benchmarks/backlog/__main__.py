"""Measure a worker with a long backlog on this machine, and write it into docs/backlog.md."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.backlog.measure import measure
from benchmarks.backlog.report import report
from benchmarks.backlog.stage import FULL, QUICK, prepare, work
from benchmarks.loop import run
from benchmarks.machine import DOCS, machine, sources
from benchmarks.page import rewrite
from benchmarks.report import TARGETS_HEAD, Table
from benchmarks.servers import Servers, opened
from benchmarks.waiting.process import PROCESSES, apart

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = "backlog.md"
TARGET = "bench-backlog"


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backlog", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test, whose figures are worth nothing")
    parser.add_argument("--later", type=int, metavar="N", help=f"jobs scheduled for later ({FULL.later:,})")
    parser.add_argument("--due", type=int, metavar="N", help=f"jobs due at once ({FULL.due:,})")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help=f"where {PAGE} is")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parsed(arguments)
    began, code = time.monotonic(), sources()
    given = {name: value for name in ("later", "due") if (value := getattr(options, name)) is not None}
    scale = replace(QUICK if options.quick else FULL, **given)
    before = os.getloadavg()[0]
    with opened(Servers) as servers:
        where = f"{machine(servers)} API, worker and servers share the cores."
        print(f"{where}\n", flush=True)
        run(prepare(servers.database_url))
        worker = PROCESSES.Process(target=work, args=(servers,), daemon=True)
        worker.start()
        assert worker.pid is not None
        try:
            found = apart(measure, servers, scale, worker.pid)
        finally:
            worker.kill()
            worker.join()
    told = replace(report(found, scale), load=(before, os.getloadavg()[0]))
    targets = Table(TARGETS_HEAD, [target.row() for target in told.targets])
    print(f"{told.text()}\n== Targets\n\n{targets.text()}\n\n{time.monotonic() - began:.0f} s in all")
    if scale.later < FULL.later or scale.due < FULL.due or not found.drained:
        print(f"{PAGE} is not rewritten: it shows whole runs only, of {FULL.later:,} and {FULL.due:,} jobs or more")
    elif sources() != code:
        print(f"{PAGE} is not rewritten: processes of this run have started with different code")
    else:
        rewrite(options.docs / PAGE, TARGET, f"### Targets\n\n{targets.markdown()}\n\n{where}\n\n{told.markdown()}")


if __name__ == "__main__":
    main()
