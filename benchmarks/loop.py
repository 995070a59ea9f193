"""How a program is run. Of what a contender's environment may lack, nothing is imported here."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run` does, on uvloop if it is there."""
    loop = importlib.import_module("uvloop").new_event_loop if installed("uvloop") else None
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
