"""The checker finds each bug that is planted, by the rule that it breaks, and says nothing of what is harmless."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from coord.testing.history import RULES
from tests.planted import situations
from tests.planted.bugs import BUGS, STANDARD
from tests.planted.edits import DoesNotApplyError, Edit, copy_with, edited
from tests.planted.harmless import HARMLESS
from tests.planted.world import running
from tests.shop import emptied

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    from coord.testing.history import Verdict
    from tests.planted.world import World

SITUATIONS = {
    name: found
    for name, found in inspect.getmembers(situations, inspect.iscoroutinefunction)
    if found.__module__ == situations.__name__
}


def cases(names: Iterable[str]) -> list[object]:
    """Those of STANDARD may run beside others, which add no rule to those that a bug breaks."""
    alone = (pytest.mark.slow, pytest.mark.alone, pytest.mark.planted)
    marks = {name: pytest.mark.slow if name in STANDARD else alone for name in names}
    return [pytest.param(name, marks=marks[name], id=name.replace(" ", "-")) for name in names]


async def verdict_on(
    edits: Iterable[Edit], situation: Callable[[World], Awaitable[None]], directory: Path, database: str, redis_url: str
) -> Verdict:
    copy_with(edits, directory)
    await emptied(redis_url)
    async with running(directory, database, redis_url) as world:
        await situation(world)
        return await world.judged()


@pytest.mark.parametrize("name", cases(BUGS))
async def test_a_planted_bug_is_found(name: str, tmp_path: Path, database: str, redis_url: str) -> None:
    bug = BUGS[name]
    verdict = await verdict_on(bug.edits, bug.situation, tmp_path, database, redis_url)
    assert bug.rule in verdict.counts, f"\n{verdict}"


@pytest.mark.parametrize("name", cases(HARMLESS))
async def test_a_harmless_change_is_not_complained_of(name: str, tmp_path: Path, database: str, redis_url: str) -> None:
    verdict = await verdict_on([HARMLESS[name]], situations.a_bit_of_everything, tmp_path, database, redis_url)
    assert verdict.holds, f"\n{verdict}"


@pytest.mark.parametrize("name", cases(SITUATIONS))
async def test_a_situation_holds_without_a_bug(name: str, tmp_path: Path, database: str, redis_url: str) -> None:
    verdict = await verdict_on([], SITUATIONS[name], tmp_path, database, redis_url)
    assert verdict.holds, f"\n{verdict}"


@pytest.mark.parametrize("name", [*BUGS, *HARMLESS])
def test_an_edit_applies_to_the_library_as_it_is(name: str) -> None:
    assert edited(BUGS[name].edits if name in BUGS else [HARMLESS[name]])


@pytest.mark.parametrize("old", ["no such text", "import"])
def test_an_edit_that_does_not_apply_once_is_an_error(old: str) -> None:
    with pytest.raises(DoesNotApplyError, match=r"coord/locks.py has this \d+ times, and not once"):
        edited([Edit("coord/locks.py", old, "")])


def test_there_are_twenty_bugs_of_many_kinds_and_ten_harmless_changes() -> None:
    assert len(BUGS) >= 20
    assert len(HARMLESS) >= 10
    assert {bug.rule for bug in BUGS.values()} == {*RULES} - {"invariant"}
    assert set(STANDARD) < set(BUGS)
