"""One stack for each pytest process: a cell leaves it usable, or it is mended before the next."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.customer import Shop
from tests.faults.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(scope="session")
async def running_shop() -> AsyncIterator[Shop]:
    with tempfile.TemporaryDirectory(prefix="coord-faults-", ignore_cleanup_errors=True) as directory:
        async with Stack(Path(directory)).running() as stack:
            yield Shop(stack)


@pytest.fixture
async def shop(running_shop: Shop) -> AsyncIterator[Shop]:
    """Whole before a cell; afterwards whatever the cell did has left no trace in ledger and rows."""
    await running_shop.stack.mend()
    yield running_shop
    await running_shop.stack.mend()
    await running_shop.sound()


@pytest.fixture
def stack(shop: Shop) -> Stack:
    return shop.stack
