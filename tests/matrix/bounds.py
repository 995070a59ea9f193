"""Which versions a leg installs: read from pyproject.toml and constraints.txt, so that they cannot drift from them."""

from __future__ import annotations

import re
import tomllib
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


class Versions(StrEnum):
    OLDEST = "oldest"
    """coord's own dependencies exactly at their lower bounds; what those need in turn is pip's choice."""
    PINNED = "pinned"
    NEWEST = "newest"
    """pip's newest within the bounds."""
    SQLALCHEMY_20 = "sqlalchemy-2.0"
    """As pinned, but for the newest SQLAlchemy 2.0."""
    SQLALCHEMY_21 = "sqlalchemy-2.1"


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def dependencies() -> list[Requirement]:
    declared = project()["dependencies"]
    assert isinstance(declared, list)
    return [Requirement(each) for each in declared]


def oldest_python() -> str:
    """As `3.11`."""
    return str(project()["requires-python"]).removeprefix(">=")


def lower_bound(requirement: Requirement) -> str:
    (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
    return bound


def upper_bound(requirement: Requirement) -> str:
    (bound,) = [each.version for each in requirement.specifier if each.operator == "<"]
    return bound


def wanted(versions: Versions) -> list[str]:
    """What is asked of pip beside coord itself."""
    match versions:
        case Versions.OLDEST:
            return [f"{_with_extras(each)}=={lower_bound(each)}" for each in dependencies()]
        case Versions.SQLALCHEMY_20:
            return ["sqlalchemy[asyncio]>=2.0,<2.1"]
        case Versions.SQLALCHEMY_21:
            return ["sqlalchemy[asyncio]>=2.1,<2.2"]
        case Versions.PINNED | Versions.NEWEST:
            return []


def constraints(versions: Versions) -> list[str]:
    """The lines of constraints.txt that hold: the tools of the tests are the same on every leg."""
    match versions:
        case Versions.PINNED:
            free = set()
        case Versions.SQLALCHEMY_20 | Versions.SQLALCHEMY_21:
            free = {"sqlalchemy", "fastapi-users-db-sqlalchemy"}  # the newest of which is for SQLAlchemy 2.0
        case Versions.OLDEST | Versions.NEWEST:
            free = _beneath_coord()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if canonicalize_name(line.partition("==")[0]) not in free]


def _with_extras(requirement: Requirement) -> str:
    return re.split(r"[<>=!~ ]", str(requirement))[0]


def _beneath_coord() -> set[str]:
    """The names of coord's dependencies and of theirs, as far as they are installed here."""
    found: set[str] = set()
    open_ = dependencies()
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            beneath = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        asked = [Requirement(line) for line in beneath]
        open_ += [each for each in asked if _applies(each, requirement.extras)]
    return found


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])
