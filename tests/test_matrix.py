"""`make test-matrix`: its bounds are the project's, its tests exist, and it says what it left out."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.matrix.__main__ import table
from tests.matrix.bounds import ROOT, Versions, constraints, dependencies, lower_bound, upper_bound, wanted
from tests.matrix.environment import NotToBeRun, python_of
from tests.matrix.legs import LEGS, Leg, Outcome, run
from tests.matrix.parts import CORE, NOT_POOLED, POOLED

DEPENDENCIES = dependencies()
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
PINNED = {canonicalize_name(name): Version(version) for name, version in PINS.items()}


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda each: each.name)
def test_every_dependency_has_both_bounds_and_its_pin_between_them(dependency: object) -> None:
    (found,) = [each for each in DEPENDENCIES if each is dependency]
    assert Version(lower_bound(found)) < Version(upper_bound(found))
    assert PINNED[canonicalize_name(found.name)] in found.specifier
    assert lower_bound(found) in found.specifier


def test_the_oldest_leg_installs_exactly_the_lower_bounds() -> None:
    asked = dict(line.split("==") for line in wanted(Versions.OLDEST))
    assert list(asked.values()) == [lower_bound(each) for each in DEPENDENCIES]
    assert [name.partition("[")[0] for name in asked] == [each.name for each in DEPENDENCIES]
    assert "redis[hiredis]" in asked


def test_only_what_a_leg_is_about_is_free_of_its_pin() -> None:
    pinned = set(constraints(Versions.PINNED))
    of_20 = {line.partition("==")[0] for line in pinned - set(constraints(Versions.SQLALCHEMY_20))}
    assert of_20 == {"SQLAlchemy", "fastapi-users-db-sqlalchemy"}
    free = {line.partition("==")[0] for line in pinned - set(constraints(Versions.OLDEST))}
    assert free >= {"SQLAlchemy", "starlette", "greenlet", "pydantic", "hiredis"}
    assert not free & {"pytest", "pytest-xdist", "hypothesis", "mypy"}


def test_the_legs_have_names_of_their_own() -> None:
    assert len({leg.name for leg in LEGS}) == len(LEGS)


@pytest.mark.parametrize("file", sorted({*CORE, *POOLED}))
def test_the_files_of_a_part_exist(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("test", NOT_POOLED)
def test_a_test_that_is_left_out_exists_and_has_a_reason(test: str) -> None:
    file, name = test.split("::")
    assert file in POOLED
    assert hasattr(importlib.import_module(Path(file).with_suffix("").as_posix().replace("/", ".")), name)
    assert NOT_POOLED[test]


def test_a_python_that_is_not_there_is_said_and_not_failed() -> None:
    with pytest.raises(NotToBeRun, match=r"no Python 3\.99"):
        python_of("3.99")
    outcome = run(Leg("future", python="3.99"), [], 1)
    assert [*table([outcome])][-1] == "future: not run: no Python 3.99 on this machine"


def test_the_table_names_what_failed() -> None:
    lines = [*table([Outcome(Leg("one"), {"python": "3.11.7"}, "", 3, ["tests.test_x::test_y: wrong"], 2.0)])]
    assert "| one" in lines[2]
    assert "3.11.7" in lines[2]
    assert lines[-1] == "one: failed tests.test_x::test_y: wrong"
