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


def edited(edits: Iterable[Edit]) -> dict[str, str]:
    """The files that they change, as they are then: such that Python can compile them."""
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts.get(edit.path) or _source(edit.path).read_text()
        if (times := text.count(edit.old)) != 1:
            raise DoesNotApplyError(f"{edit.path} has this {times} times, and not once:\n{edit.old}")
        texts[edit.path] = text.replace(edit.old, edit.new)
        compile(texts[edit.path], edit.path, "exec", dont_inherit=True)
    return texts


def _source(path: str) -> Path:
    return ROOT / "tests" / "planted" / APPLICATION if path == APPLICATION else ROOT / path


def copy_with(edits: Iterable[Edit], directory: Path) -> Path:
    """The library and the application, copied there and edited; what is compiled of the rest comes along."""
    half_written = shutil.ignore_patterns("*.pyc.*")  # by another process, which renames it in a moment
    shutil.copytree(ROOT / "coord", directory / "coord", ignore=half_written)
    shutil.copy(_source(APPLICATION), directory / APPLICATION)
    for name, text in edited(edits).items():
        (directory / name).write_text(text)
    return directory
