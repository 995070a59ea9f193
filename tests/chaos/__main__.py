"""Drive orders through the shop while its programs and servers fail, and look up that nothing came of it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from coord.testing.proof import prove
from tests.chaos.shop import SHOP, customer, effect_of, left_by, stock_for, stocking

if TYPE_CHECKING:
    from coord.testing.proof import Proof

PACE = 10.0
"""Orders a second. At 25, more wait for a worker frozen with the tables locked than two cores catch up with."""
LOOKS = 1
"""Of each customer, at one of the orders that were answered last."""
SEEN = 50


async def run(seconds: float, pace: float = PACE, looks: int = LOOKS, **options: Any) -> Proof:
    stock = stock_for(round(seconds * pace))
    client = partial(customer, looks=looks, seen=deque(maxlen=SEEN))
    fixed: dict[str, Any] = {"effect_of": effect_of, "read": left_by(stock), "prepare": stocking(stock)}
    return await prove(SHOP, client, seconds=seconds, pace=pace, **fixed, **options)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long the storm lasts, 60 unless given")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat its faults")
    parser.add_argument("--pace", type=float, default=PACE, help=f"orders a second, {PACE:g} unless given")
    parser.add_argument("--looks", type=int, default=LOOKS, help=f"of each customer at an order, {LOOKS} unless given")
    options = parser.parse_args()
    proof = asyncio.run(run(options.seconds, options.pace, options.looks, seed=options.seed))
    if not proof.holds:
        print(f"make chaos SECONDS={options.seconds:g} SEED={proof.seed} PACE={options.pace:g} LOOKS={options.looks}")
    return 0 if proof.holds else 1


if __name__ == "__main__":
    sys.exit(main())
