"""Drive orders through the shop while its workers, Redis and PostgreSQL fail, and look up that nothing came of it."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.customers import customers, put, serve, stock_for
from tests.chaos.faults import Storm
from tests.chaos.stack import Stack
from tests.chaos.verdict import answered_in_the_calm, broken, found_in, settled

PACE = 10.0
"""Orders a second. At 25, more wait for a worker frozen with the tables locked than two cores catch up with."""


@dataclass(frozen=True, slots=True)
class Report:
    lines: list[str]
    broken: list[str]

    def __str__(self) -> str:
        verdict = [f"BROKEN: {line}" for line in self.broken] or ["everything holds"]
        return "\n".join([*self.lines, *verdict])


async def run(directory: Path, seconds: float, seed: int, pace: float = PACE) -> Report:
    """A storm of so many seconds; some more pass until everybody is served."""
    crowd = customers(int(seconds * pace))
    stock = stock_for(crowd)
    stack = Stack(directory)
    async with stack.running():
        storm = Storm(stack, seconds, seed)
        await put(stock, stack.url)
        serving = asyncio.create_task(serve(crowd, stack.url, seconds, lambda: storm.is_calm))
        await storm.rage()
        final = await settled(stack.postgresql.url, serving)
        await serving
        found = await found_in(stack.postgresql.url)
    effect, asked = answered_in_the_calm(crowd)
    everything = [one for customer in crowd for one in customer.asked]
    answers = Counter(str(one.answer) for one in everything)
    slowest = {answer: max(one.seconds for one in everything if str(one.answer) == answer) for answer in answers}
    attempts = Counter(job["attempt"] for job in found.jobs)
    return Report(
        [
            f"{len(crowd)} orders in {seconds:g} s, seed {seed}",
            "faults: " + ", ".join(f"{count} × {kind}" for kind, count in sorted(storm.done.items())),
            "answers: "
            + ", ".join(
                f"{count} × {answer} within {slowest[answer]:.1f} s" for answer, count in sorted(answers.items())
            ),
            f"sent while the servers were up: {asked}, answered with their effect: {effect / max(asked, 1):.1%}",
            "attempts a job: " + ", ".join(f"{count} × {attempt}" for attempt, count in sorted(attempts.items())),
            f"every job was final within {final:.1f} s of the last fault, or of its own enqueueing if that was later",
        ],
        [*broken(crowd, stock, final, found)],
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long the storm lasts, 60 unless given")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat its faults")
    parser.add_argument("--pace", type=float, default=PACE, help=f"orders a second, {PACE:g} unless given")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"make chaos SECONDS={options.seconds:g} SEED={seed} PACE={options.pace:g}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="coord-chaos-"))
    report = asyncio.run(run(directory, options.seconds, seed, options.pace))
    print(f"{report}\nlogs: {directory}")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
