"""An environment for each package that is compared, made from the package index when it is missing."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import ROOT
from tests.matrix.environment import NotToBeRun
from tests.matrix.environment import python_of as interpreter

if TYPE_CHECKING:
    from collections.abc import Sequence

PINS = Path(__file__).parent / "environments"
DIRECTORY = ROOT / ".bench"
READY = "ready"
"""The file in an environment that says which pins it was made of."""


def python_of(name: str, minor: str | None = None) -> Path:
    """The interpreter of this environment, which is made if it is missing or was made of other pins.

    `minor` is the version of Python that it is made with, unless that does not matter.
    """
    directory = DIRECTORY / name
    ready = directory / READY
    pins = _pins(name)
    if not ready.exists() or ready.read_text() != pins:
        print(f"Making the environment of {name}", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        _run(sys.executable if minor is None else _interpreter(minor), "-m", "venv", str(directory))
        quietly = ("--quiet", "--disable-pip-version-check")
        _run(str(_python(directory)), "-m", "pip", "install", *quietly, "--requirement", str(PINS / f"{name}.txt"))
        ready.write_text(pins)
    return _python(directory)


def versions(python: Path, packages: Sequence[str]) -> str:
    """Of these packages in the environment of an interpreter."""
    sites = python.parent.parent.glob("lib/python*/site-packages")
    found = {each.metadata["Name"].lower(): each.version for each in distributions(path=[*map(str, sites)])}
    return ", ".join(f"{package} {found.get(package.lower(), '?')}" for package in packages)


def _interpreter(minor: str) -> str:
    try:
        return interpreter(minor)
    except NotToBeRun as error:
        raise SystemExit(f"{error}; --only leaves out who needs it") from None


def _python(directory: Path) -> Path:
    return directory / "bin" / "python"


def _pins(name: str) -> str:
    pins = (PINS / f"{name}.txt").read_text()
    for option, file in (("--constraint", "constraints.txt"), ("--editable", "pyproject.toml")):
        if option in pins:
            pins += (ROOT / file).read_text()
    return hashlib.sha256(pins.encode()).hexdigest()


def _run(*command: str) -> None:
    ended = subprocess.run(command, cwd=ROOT, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed, as said above")
