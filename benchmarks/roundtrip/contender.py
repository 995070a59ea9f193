"""A contender: how the request gets its job done, and learns of it."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from benchmarks.roundtrip.orders import Base, Orders

if TYPE_CHECKING:
    from benchmarks.roundtrip.orders import Scene

PATIENCE = 10.0
"""Seconds after which a request has had no answer."""


class Contender(ABC):
    """Both sides of one; each process makes its own, and opens one side of it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.orders = Orders(scene)

    async def prepare(self) -> None:
        """Make the table of orders, and whatever else it needs, in an empty database."""
        async with self.orders.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    @abstractmethod
    async def work(self) -> None:
        """Run jobs until this process is killed."""

    @abstractmethod
    async def open(self) -> None:
        """Connect the requester's side."""

    async def request(self, order_id: int) -> str:
        """Answer with what the order's row says."""
        await self.orders.insert(order_id)
        await self.have_fulfilled(order_id)
        return await self.orders.status(order_id)

    async def have_fulfilled(self, order_id: int) -> None:
        """Enqueue the job, and return when it is said to be done."""
        raise NotImplementedError


def contender(path: str, scene: Scene) -> Contender:
    """Of "module:Class", the module being one of `benchmarks.roundtrip.contenders`."""
    module, _, name = path.partition(":")
    made: Contender = getattr(importlib.import_module(f"benchmarks.roundtrip.contenders.{module}"), name)(scene)
    return made
