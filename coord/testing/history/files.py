"""A history in a file, a record a line: written as it happens, read as often as one likes."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, Self

from coord.testing.history.records import Operation, from_line, to_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coord.testing.history.records import Outcome, Record


class HistoryFile:
    """Iterated from its beginning each time. A line that is no record is a `ValueError` that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Record]:
        with self.path.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield from_line(line)
                except ValueError as error:
                    raise ValueError(f"{self.path}, line {number}: {error}") from error


class Recorder:
    """Writes a history; times are seconds since it was made. A context manager, which closes the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("x")
        self._numbers = itertools.count(1)
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def now(self) -> float:
        return time.monotonic() - self._began

    def write(self, record: Record) -> None:
        self._file.write(to_line(record) + "\n")

    def operation(self, asked: str, began: float, outcome: Outcome, **fields: Any) -> Operation:
        """Of an answer that has just come; `began` is as `now()` was."""
        operation = Operation(next(self._numbers), asked, began, self.now(), outcome, **fields)
        self.write(operation)
        return operation
