"""Start the shop, let three hundred customers in at once, and check from the database that every promise held."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import asyncpg
import httpx

from demo.customers import serve_all, stock_for, wishes
from demo.report import console, orders_bar, show, show_checks, show_failure, show_serving
from demo.stack import StackError, running
from demo.verify import verify

if TYPE_CHECKING:
    from collections.abc import Sequence

PORT = 8000
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 only if everything held."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--orders", type=_count, default=300, metavar="N", help="how many at once, 300 unless given")
    parser.add_argument("--serve", action="store_true", help="keep the shop up and print what to try")
    parser.add_argument("--port", type=int, help="where it serves, 8000 unless given or taken")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has its background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    try:
        return _serve(options.port) if options.serve else _demonstrate(options.orders)
    except KeyboardInterrupt:
        console.print("\n  stopped")
        return 0 if options.serve else INTERRUPTED
    except (StackError, httpx.HTTPError, asyncpg.PostgresError, OSError) as error:
        show_failure(str(error) or type(error).__name__)
        return 1


def _demonstrate(count: int) -> int:
    began = time.monotonic()
    console.print(f"\n  [bold]{count} orders at once[/], each answered when a worker has dealt with it\n")
    with running(port=0) as stack:
        wanted = wishes(count, run=f"{time.time_ns() // 1_000_000:x}")
        stock = stock_for(wanted)
        with orders_bar(count) as tick:
            outcomes = asyncio.run(serve_all(stack.url, wanted, stock, tick))
        show(outcomes)
        checks = asyncio.run(verify(stack.database_url, outcomes, stock))
        show_checks(checks)
    broken = [check for check in checks if check.broken]
    if broken:
        show_failure(f"{len(broken)} of {len(checks)} promises broken")
        return 1
    console.print(f"\n  [bold green]all of it holds[/], {time.monotonic() - began:.1f} s with start and stop\n")
    return 0


def _serve(port: int | None) -> int:
    if port is None:
        port = PORT if _is_free(PORT) else 0
    with running(port) as stack:
        show_serving(stack.url, _sample_order(stack.url))
        while not stack.ended():
            time.sleep(0.2)
    show_failure("the shop ended by itself")
    return 1


def _sample_order(url: str) -> int:
    with httpx.Client(base_url=url, trust_env=False) as shop:
        shop.put("/stock/tea", json={"quantity": 100}).raise_for_status()
        placed = shop.post("/orders", json={"sku": "tea", "quantity": 3}).raise_for_status()
    order_id: int = placed.json()["id"]
    return order_id


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError("between 1 and 10,000")
    return number


if __name__ == "__main__":
    sys.exit(main())
