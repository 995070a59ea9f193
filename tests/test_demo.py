"""The demo proves what it says, says what is broken, and leaves nothing running."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest

from demo.customers import Outcome, Wish, stock_for, wishes
from demo.verify import Check, verify
from tests.clusters import lay
from tests.commands import started
from tests.project import processes_in
from tests.serving import engine_at, eventually
from tests.shop import ROOT, dsn_of, empty_database
from worker.models import Base

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SHOP_VARIABLES = ("COORD_DATABASE_URL", "COORD_REDIS_URL")


@asynccontextmanager
async def demo(directory: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m demo` in a directory of its own, with servers of its own, as a shell's background job."""
    environment = {name: value for name, value in os.environ.items() if name not in SHOP_VARIABLES}
    async with started(
        *("sh", "-c", "trap '' INT; exec \"$@\"", "sh"),  # which ignores SIGINT
        *(sys.executable, "-m", "demo", *options),
        cwd=directory,
        env={**environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    ) as process:
        yield process


async def output_until(process: asyncio.subprocess.Process, pattern: str) -> re.Match[str]:
    assert process.stdout is not None
    said = ""
    async with asyncio.timeout(60):
        while not (match := re.search(pattern, said)):
            line = (await process.stdout.readline()).decode()
            assert line, f"it ended before it said {pattern!r}: {said}"
            said += line
    return match


async def left_behind(directory: Path) -> list[str]:
    with suppress(AssertionError):
        await eventually(lambda: not processes_in(directory), within=20)
    return [*processes_in(directory).values()]


@pytest.mark.slow
async def test_it_holds_twice_and_leaves_no_process(tmp_path: Path) -> None:
    lay(tmp_path / ".coord/demo/postgresql")
    last = 0
    for _ in range(2):
        async with demo(tmp_path, "--orders", "40") as process:
            said = (await process.communicate())[0].decode()
        assert process.returncode == 0, said
        assert re.search(r"answered +40 +of 40", said)
        counts = [int(re.search(rf"{word} +(\d+)", said)[1]) for word in ("fulfilled", "rejected")]  # type: ignore[index]
        assert sum(counts) == 40
        assert min(counts) > 0
        assert said.count("✓") == 5
        assert "\x1b" not in said
        assert f"invoices {last + 1}–{last + counts[0]}" in said
        last += counts[0]
    assert f"1…{last} without a gap" in said
    assert await left_behind(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_the_commands_it_offers_work_and_when_it_is_stopped_the_shop_stops(
    tmp_path: Path, number: signal.Signals
) -> None:
    lay(tmp_path / ".coord/demo/postgresql")
    async with demo(tmp_path, "--serve", "--port", "0") as process:
        url = (await output_until(process, r"open at (http://\S+)"))[1]
        path = (await output_until(process, rf"curl -i -X POST {url}(\S+)"))[1]
        await output_until(process, "Ctrl-C closes it")
        async with httpx.AsyncClient(base_url=url, timeout=40) as http:
            assert (await http.post(path)).json()["status"] == "fulfilled"
            assert (await http.get("/stock/tea")).json() == {"sku": "tea", "quantity": 97}
        process.send_signal(number)
        said = (await process.communicate())[0].decode()
    assert process.returncode == (0 if number != signal.SIGKILL else -signal.SIGKILL), said
    assert await left_behind(tmp_path) == []
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(url)


@pytest.mark.slow
async def test_a_shop_that_does_not_start_is_a_failure_with_its_log(tmp_path: Path) -> None:
    (tmp_path / ".coord").mkdir()
    (tmp_path / ".coord" / "demo").write_text("a file where the servers' directory should be")
    async with demo(tmp_path, "--orders", "1") as process:
        said = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert "✗ the stack did not start, coord dev: " in said
    assert ".coord/demo.log" in said
    assert "Traceback" not in said


STOCK = {"tea": 10, "saffron": 3}
ORDERS = [("tea", 4, "fulfilled", 1), ("saffron", 3, "fulfilled", 2), ("saffron", 2, "rejected", None)]
TAMPERING = {
    "a gap": ("UPDATE orders SET invoice_number = 7 WHERE invoice_number = 2", "without a gap"),
    "a late start": ("UPDATE orders SET invoice_number = invoice_number + 5", "without a gap"),
    "a nought": ("UPDATE orders SET invoice_number = 0 WHERE invoice_number = 1", "without a gap"),
    "no invoice": ("UPDATE orders SET invoice_number = NULL WHERE invoice_number = 2", "without a gap"),
    "an invoice for nothing": ("UPDATE orders SET invoice_number = 3 WHERE status = 'rejected'", "without a gap"),
    "lost stock": ("UPDATE stock SET quantity = 5 WHERE sku = 'tea'", "stock is exact"),
    "won stock": ("UPDATE stock SET quantity = 7 WHERE sku = 'tea'", "stock is exact"),
    "sold twice": ("UPDATE orders SET quantity = 11 WHERE sku = 'tea'", "never went negative"),
    "stock after all": ("UPDATE stock SET quantity = 2 WHERE sku = 'saffron'", "turned away"),
    "another status": ("UPDATE orders SET status = 'rejected' WHERE sku = 'tea'", "were told"),
    "a lost order": ("DELETE FROM orders WHERE status = 'rejected'", "were told"),
}


@pytest.fixture
async def sold(database_url: str) -> AsyncIterator[tuple[str, list[Outcome]]]:
    """A database in which all holds, and what its customers were told."""
    async with empty_database(database_url) as url:
        async with engine_at(url) as engine, engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        outcomes = []
        database = await asyncpg.connect(dsn_of(url))
        await database.execute("INSERT INTO stock VALUES ('tea', 6), ('saffron', 0)")
        for sku, quantity, status, number in ORDERS:
            order = await database.fetchrow(
                "INSERT INTO orders (sku, quantity, status, invoice_number) VALUES ($1, $2, $3, $4)"
                " RETURNING id, sku, quantity, status, invoice_number",
                *(sku, quantity, status, number),
            )
            outcomes.append(Outcome(Wish(sku, quantity), 0.1, dict(order)))
        await database.close()
        yield url, outcomes


def broken(checks: list[Check]) -> str:
    return "; ".join(check.promise for check in checks if check.broken)


async def test_it_finds_nothing_where_all_holds(sold: tuple[str, list[Outcome]]) -> None:
    url, outcomes = sold
    assert broken(await verify(url, outcomes, STOCK)) == ""


@pytest.mark.parametrize(("statement", "promise"), TAMPERING.values(), ids=TAMPERING.keys())
async def test_it_finds_what_is_broken(sold: tuple[str, list[Outcome]], statement: str, promise: str) -> None:
    url, outcomes = sold
    database = await asyncpg.connect(dsn_of(url))
    await database.execute(statement)
    await database.close()
    assert promise in broken(await verify(url, outcomes, STOCK))


async def test_it_finds_who_was_not_answered(sold: tuple[str, list[Outcome]]) -> None:
    url, outcomes = sold
    unanswered: list[Any] = [*outcomes[:2], Outcome(outcomes[2].wish, 25.0, None, "202 later")]
    assert broken(await verify(url, unanswered, STOCK)) == "every order was answered with its outcome"


def test_of_one_thing_there_is_too_little() -> None:
    wanted = wishes(300, "x")
    short = [sku for sku, level in stock_for(wanted).items() if level < sum(w.quantity for w in wanted if w.sku == sku)]
    assert short == ["saffron.x"]
