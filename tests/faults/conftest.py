"""One stack for as many cells as leave it whole: after one that has failed the next begins with a new one."""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.customer import Shop
from tests.faults.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator

HAS_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


class Premises:
    """Where the shop is."""

    def __init__(self) -> None:
        self._exits = AsyncExitStack()
        self._shop: Shop | None = None

    async def shop(self) -> Shop:
        if self._shop is None:
            directory = tempfile.TemporaryDirectory(prefix="coord-faults-", ignore_cleanup_errors=True)
            stack = Stack(Path(self._exits.enter_context(directory)))
            self._shop = Shop(await self._exits.enter_async_context(stack.running()))
        return self._shop

    async def leave(self) -> None:
        self._shop = None
        await self._exits.aclose()


@pytest.fixture(scope="session")
async def premises() -> AsyncIterator[Premises]:
    premises = Premises()
    yield premises
    await premises.leave()


@pytest.fixture
async def shop(request: pytest.FixtureRequest, premises: Premises) -> AsyncIterator[Shop]:
    """Whole before a cell; afterwards whatever the cell did has left no trace in ledger and rows."""
    shop = await premises.shop()
    yield shop
    is_sound = False
    try:
        await shop.close()
        await shop.stack.mend()
        await shop.sound()
        is_sound = True
    finally:
        if not is_sound or request.node.stash.get(HAS_FAILED, False):
            await premises.leave()


@pytest.fixture
def stack(shop: Shop) -> Stack:
    return shop.stack
