"""What the demo shows."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from demo.customers import Outcome
    from demo.verify import Check

LOG = Path(".coord/demo.log")
BARS = 8
BAR_WIDTH = 40

console = Console(highlight=False)


@contextmanager
def starting(what: str) -> Iterator[None]:
    """Says what is being started, and how long it took."""
    began = time.monotonic()
    with console.status(f"starting {what}"):
        yield
    console.print(f"  started {what} [dim]in {time.monotonic() - began:.1f} s[/]")


@contextmanager
def orders_bar(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; the block is given what to call for each order that was answered."""
    bar = BarColumn(BAR_WIDTH, complete_style="cyan", finished_style="green")
    with Progress(TextColumn("  answered"), bar, MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def show_serving(url: str, order_id: int) -> None:
    json = "-H 'content-type: application/json' -d"
    console.print(f"\n  the shop is open at [bold]{url}[/] [dim](its API: {url}/docs, its log: {LOG})[/]; try\n")
    for command in (
        f"curl -i -X POST {url}/orders/{order_id}/fulfil",
        f"curl {url}/stock/tea",
        f'curl -i -X POST {url}/orders {json} \'{{"sku": "tea", "quantity": 3}}\'',
        f"curl -X PUT {url}/stock/tea {json} '{{\"quantity\": 100}}'",
        f"curl {url}/healthz",
    ):
        console.print(f"    {command}", soft_wrap=True, markup=False)
    console.print("\n  Ctrl-C closes it")


def show_failure(reason: str) -> None:
    console.print(Text.assemble("\n  ", ("✗", "bold red"), f" {reason}; the log is {LOG}\n"), soft_wrap=True)


def show(outcomes: Sequence[Outcome]) -> None:
    console.print()
    console.print(_counts(outcomes))
    answered = sorted(outcome.seconds * 1000 for outcome in outcomes if outcome.order is not None)
    if answered:
        console.print(_percentiles(answered))
        console.print(_histogram(answered))


def show_checks(checks: Sequence[Check]) -> None:
    for check in checks:
        sign, style = ("✗", "bold red") if check.broken else ("✓", "green")
        console.print(Text.assemble("  ", (sign, style), f" {check.promise}"))
        if check.broken:
            console.print(Text(f"    {check.broken}", "red"))


def _counts(outcomes: Sequence[Outcome]) -> Text:
    told = [outcome.order for outcome in outcomes if outcome.order is not None]
    invoices = [order["invoice_number"] for order in told if order["status"] == "fulfilled"]
    numbers = f"invoices {min(invoices)}–{max(invoices)}" if invoices else ""
    rows = [
        ("answered", len(told), f"of {len(outcomes)}"),
        ("fulfilled", len(invoices), numbers),
        ("rejected", len(told) - len(invoices), "out of stock"),
    ]
    return Text("\n").join(
        Text.assemble(f"  {name:9} ", (f"{count:6}", "bold"), (f"  {remark}", "dim")) for name, count, remark in rows
    )


def _percentiles(milliseconds: Sequence[float]) -> Text:
    text = Text("\n  request to answer")
    for percent in (50, 95, 99):
        value = milliseconds[math.ceil(len(milliseconds) * percent / 100) - 1]
        text.append(f"   p{percent} ", "dim").append(f"{value:.0f} ms", "bold")
    return text.append("\n")


def _histogram(milliseconds: Sequence[float]) -> Text:
    step = _round_up(milliseconds[-1] / BARS)
    counts = [0] * (int(milliseconds[-1] // step) + 1)
    for value in milliseconds:
        counts[int(value // step)] += 1
    width = len(f"{len(counts) * step}")
    text = Text()
    for number, count in enumerate(counts):
        bar = "█" * math.ceil(BAR_WIDTH * count / max(counts))
        text.append(f"  {number * step:{width}}–{(number + 1) * step:{width}} ms  ", "dim")
        text.append(bar, "cyan").append(f" {count}\n" if count else "\n")
    return text


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 and so on."""
    power = 10 ** math.floor(math.log10(max(value, 1)))
    return int(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value))
