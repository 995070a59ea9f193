"""A copy of the library with some of its text replaced; a text that is not there exactly once is an error."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

from tests.shop import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

APPLICATION = "parcels.py"


class Edit(NamedTuple):
    """In one file, from the root of the checkout."""

    path: str
    old: str
    new: str


class DoesNotApplyError(AssertionError):
    """The library has changed: the edit must follow it."""


def copy_with(edits: Iterable[Edit], directory: Path) -> Path:
    """The library and the application, copied there and edited."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "coord", directory / "coord", ignore=ignored)
    shutil.copy(ROOT / "tests" / "planted" / APPLICATION, directory / APPLICATION)
    for edit in edits:
        path = directory / edit.path
        text = path.read_text()
        if (times := text.count(edit.old)) != 1:
            raise DoesNotApplyError(f"{edit.path} has this {times} times, and not once:\n{edit.old}")
        path.write_text(text.replace(edit.old, edit.new))
        compile(path.read_text(), str(path), "exec", dont_inherit=True)
    return directory
