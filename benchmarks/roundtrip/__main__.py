"""Measure the whole round trip, by coord, by hand and by its peers, and write it into docs/roundtrip.md."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from benchmarks.loop import installed
from benchmarks.machine import DOCS, machine, sources
from benchmarks.page import rewrite
from benchmarks.report import TARGETS_HEAD, Table, milliseconds
from benchmarks.roundtrip.catalogue import ALL, COORD, FLOOR, other_checkout
from benchmarks.roundtrip.crew import TurnError
from benchmarks.roundtrip.environments import python_of, versions
from benchmarks.roundtrip.findings import Findings
from benchmarks.roundtrip.plan import planned
from benchmarks.roundtrip.plot import draw
from benchmarks.roundtrip.scale import FULL, QUICK
from benchmarks.roundtrip.tables import sections
from benchmarks.roundtrip.targets import targets
from benchmarks.roundtrip.turn import play
from benchmarks.servers import Servers, opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.roundtrip.catalogue import Entry
    from benchmarks.roundtrip.plan import Step
    from benchmarks.roundtrip.scale import Scale
    from benchmarks.roundtrip.turn import Turn

PAGE = "roundtrip.md"
FIGURE = "roundtrip-benchmark.svg"
TARGET = "bench-roundtrip"
ENOUGH = 10
"""Pairs, for a ratio that is worth showing."""


def main(arguments: Sequence[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _main(_parsed(arguments))
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; nothing was written") from None


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [entry.name for entry in ALL]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roundtrip", description=__doc__)
    quick = "a smoke test of a minute, of floor and coord in this very environment, whose figures are worth nothing"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--pairs", type=int, metavar="N", help=f"of floor and coord, for each lock mode ({FULL.pairs})")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"of the others, for each lock mode ({FULL.rounds})")
    only = f"some of {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=only)
    against = "other checkouts whose coord plays as well, say a worktree of the commit before"
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="DIR", help=against)
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help=f"where {PAGE} is")
    return parser.parse_args(arguments)


def _main(options: argparse.Namespace) -> None:
    began, code = monotonic(), sources()
    base = QUICK if options.quick else FULL
    given = {name: value for name in ("pairs", "rounds") if (value := getattr(options, name)) is not None}
    scale = replace(base, **given)
    entries = (*_chosen(options), *map(other_checkout, options.against))
    pythons = {entry: _python(entry, options.quick) for entry in entries}
    steps = planned(entries, scale.pairs, scale.rounds)
    with opened(Servers) as servers:
        where = f"{machine(servers)} Servers, requester and worker share the cores."
        print(f"{where}\n", flush=True)
        found = Findings(_played(servers, steps, pythons, scale))
    told = sections(found, scale, {entry: versions(python, entry.packages) for entry, python in pythons.items()})
    print("\n".join(section.text() for section in told))
    held = Table(TARGETS_HEAD, [target.row() for target in targets(found)])
    print(f"== Targets\n\n{held.text()}\n\n{monotonic() - began:.0f} s in all")
    whole = base is FULL and entries == ALL and scale.pairs >= ENOUGH and len(found.played) == len(steps)
    if not whole:
        print(f"{PAGE} is not rewritten: it shows whole runs only, of {ENOUGH} pairs or more")
        _try_drawing(found)
    elif not installed("matplotlib"):
        print(f"{PAGE} is not rewritten: matplotlib is not installed; make {TARGET} has it")
    elif sources() != code:
        print(f"{PAGE} is not rewritten: processes of this run have started with different code")
    else:
        draw(options.docs / FIGURE, found)
        figure = f"![For each lock mode, a request alone and many at once, by contender]({FIGURE})"
        parts = [figure, "### Targets", held.markdown(), where, *(section.markdown() for section in told)]
        rewrite(options.docs / PAGE, TARGET, "\n\n".join(parts))


def _chosen(options: argparse.Namespace) -> tuple[Entry, ...]:
    if options.only:
        return tuple(entry for entry in ALL if entry.name in options.only)
    return (FLOOR, COORD) if options.quick else ALL


def _python(entry: Entry, quick: bool) -> Path:
    return Path(sys.executable) if quick and not entry.is_peer else python_of(entry.environment, entry.python)


def _played(
    servers: Servers, steps: Sequence[Step], pythons: dict[Entry, Path], scale: Scale
) -> list[tuple[Step, Turn]]:
    played = []
    for number, step in enumerate(steps, 1):
        what = f"{number}/{len(steps)} {step.entry.title}, {step.mode}"
        try:
            turn = asyncio.run(play(servers, step.entry, pythons[step.entry], step.mode, scale))
        except (TurnError, TimeoutError) as error:
            print(f"{what}: failed: {error or 'took too long'}", flush=True)
            continue
        played.append((step, turn))
        lost = f", {turn.lost} lost" if turn.lost else ""
        failed = f", {turn.failures.total()} failed" if turn.failures else ""
        print(f"{what}: {milliseconds(turn.p50)}, {turn.rate:.0f} requests/s{lost}{failed}", flush=True)
    return played


def _try_drawing(found: Findings) -> None:
    if installed("matplotlib") and found.played:
        with tempfile.TemporaryDirectory() as directory:
            draw(Path(directory) / FIGURE, found)


if __name__ == "__main__":
    main()
