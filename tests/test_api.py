"""What users import changes when somebody says so, and not by the way."""

from __future__ import annotations

import difflib

import coord
from tests.api import COMMAND, SNAPSHOT, described


def test_public_names_and_their_types_are_those_of_the_snapshot() -> None:
    kept, found = SNAPSHOT.read_text().splitlines(), described().splitlines()
    changes = "\n".join(difflib.unified_diff(kept, found, "tests/api.txt", "the code", lineterm=""))
    assert not changes, f"{changes}\nIf this is meant: {COMMAND}, and say it in CHANGELOG.md"


def test_every_public_name_is_in_the_snapshot_with_its_types() -> None:
    text = described()
    for name in coord.__all__:
        assert f" {name}(" in text or f"class {name}" in text
    assert ": ?" not in text
    assert "    until: Callable[[M], bool] | None = None,\n" in text
    assert "    tables: Sequence[str]\n" in text
    assert "    QUEUED = 'queued'\n" in text
    assert "class RowNotFoundError(CoordError, LookupError)\n" in text
