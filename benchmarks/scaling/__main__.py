"""Measure how coord's round trip scales on this machine, and write it into docs/scaling.md, with where it leads."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from benchmarks.machine import DOCS, machine, sources
from benchmarks.page import rewrite
from benchmarks.report import Section, Table, milliseconds
from benchmarks.roundtrip.catalogue import COORD
from benchmarks.roundtrip.crew import TurnError
from benchmarks.roundtrip.environments import python_of
from benchmarks.roundtrip.plan import EXCLUSIVE, MODES, SIDE_BY_SIDE
from benchmarks.roundtrip.scale import FULL, QUICK
from benchmarks.roundtrip.turn import Team
from benchmarks.scaling import limits
from benchmarks.scaling.cells import Cell, sample
from benchmarks.servers import Servers, opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.report import Row
    from benchmarks.roundtrip.scale import Scale
    from benchmarks.scaling.cells import Sample

    Cells = dict[tuple[str, Team], list[Sample]]

PAGE = "scaling.md"
TARGET = "bench-scaling"
TEAMS = [Team(workers, requesters) for requesters in (1, 2) for workers in (1, 2, 4)]
QUICK_TEAMS = [Team(2, 1)]
ROUNDS = 3
HEAD = (
    "API processes",
    "worker processes",
    "requests/s",
    "lowest–highest",
    "p50",
    "p99",
    "lost",
    "CPU µs a request: API",
    "workers",
    "PostgreSQL",
    "Redis",
    "cores busy",
)


def main(arguments: Sequence[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    quick = "a smoke test of a minute, in this very environment, whose figures are worth nothing"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"of every cell ({ROUNDS})")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help=f"where {PAGE} is")
    try:
        _main(parser.parse_args(arguments))
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; nothing was written") from None


def _main(options: argparse.Namespace) -> None:
    began, code = monotonic(), sources()
    scale, teams, rounds = (QUICK, QUICK_TEAMS, 1) if options.quick else (FULL, TEAMS, options.rounds)
    python = Path(sys.executable) if options.quick else python_of(COORD.environment)
    before = os.getloadavg()[0]
    with opened(Servers) as servers:
        where = f"{machine(servers)} All processes share the cores."
        print(f"{where}\n", flush=True)
        found = _sampled(servers, python, teams, rounds, scale)
    cells = [Cell(mode, team, samples) for (mode, team), samples in found.items() if samples]
    told = _sections(cells, scale)
    told[0] = replace(told[0], load=(before, os.getloadavg()[0]))
    print("\n".join(section.text() for section in told))
    print(f"{monotonic() - began:.0f} s in all")
    if options.quick or any(len(samples) < ROUNDS for samples in found.values()):
        print(f"{PAGE} is not rewritten: it shows whole runs only, of {ROUNDS} rounds or more")
    elif sources() != code:
        print(f"{PAGE} is not rewritten: processes of this run have started with different code")
    else:
        rewrite(options.docs / PAGE, TARGET, "\n\n".join([where, *(section.markdown() for section in told)]))


def _sampled(servers: Servers, python: Path, teams: Sequence[Team], rounds: int, scale: Scale) -> Cells:
    """Every cell once a round, each round in another order."""
    keys = [(mode, team) for team in teams for mode in MODES]
    found: Cells = {key: [] for key in keys}
    for number in range(rounds):
        turned = number * len(keys) // rounds
        for place, (mode, team) in enumerate((*keys[turned:], *keys[:turned]), 1):
            what = f"{number * len(keys) + place}/{rounds * len(keys)} {_named(team)}, {mode}"
            try:
                one = asyncio.run(sample(servers, python, mode, team, scale))
            except (TurnError, TimeoutError) as error:
                print(f"{what}: failed: {error or 'took too long'}", flush=True)
                continue
            found[mode, team].append(one)
            print(f"{what}: {one.rate:.0f} requests/s", flush=True)
    return found


def _named(team: Team) -> str:
    return f"{team.requesters} API, {team.workers} worker"


def _sections(cells: Sequence[Cell], scale: Scale) -> list[Section]:
    tables = []
    for mode in MODES:
        head = (mode, *HEAD)
        tables.append(Table(head, [("", *_row(cell)) for cell in cells if cell.mode == mode]))
    remarks = [
        f"{scale.requesters} requesters at once in all, spread over the API processes; a worker runs 20 jobs at once.",
        "The figures are medians of the rounds. CPU is what all processes of a kind used, divided by the answers.",
    ]
    told = [Section("Processes", tables, remarks=remarks)]
    best = {mode: max((c for c in cells if c.mode == mode), key=lambda c: c.rate, default=None) for mode in MODES}
    side_by_side, exclusive = best[SIDE_BY_SIDE], best[EXCLUSIVE]
    if side_by_side is not None and exclusive is not None:
        told.append(limits.report(side_by_side, exclusive))
    return told


def _row(cell: Cell) -> Row:
    lost, failed = (sum(getattr(one, what) for one in cell.samples) for what in ("lost", "failed"))
    return (
        str(cell.team.requesters),
        str(cell.team.workers),
        f"{cell.rate:.0f}",
        f"{cell.rates[0]:.0f}–{cell.rates[-1]:.0f}",
        milliseconds(cell.p50),
        milliseconds(cell.p99),
        f"{lost}" + (f", {failed} failed" if failed else ""),
        *(f"{seconds * 1e6:,.0f}" for seconds in cell.cost.all),
        f"{cell.rate * sum(cell.cost.all):.2f}",
    )


if __name__ == "__main__":
    main()
