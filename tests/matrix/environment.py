"""A virtual environment for each set of versions and each Python, kept until what it was made of changes."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.matrix.bounds import ROOT, Versions, constraints, wanted

HOME = ROOT / ".venv-matrix"
SHOWN = ("sqlalchemy", "asyncpg", "redis", "fastapi", "anyio")
VERSIONS_OF = """
import importlib.metadata, json, platform, sys
found = {name: importlib.metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), **found}))
"""


class NotToBeRun(Exception):
    """Something that the leg needs is not on this machine; the message says what."""


def python_of(minor: str) -> str:
    """An interpreter of this minor version: on the path, or among pyenv's."""
    if minor == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{minor}"), *map(str, sorted(pyenv.glob(f"{minor}.*/bin/python")))]
    for candidate in candidates:
        # A shim of pyenv's is on the path for versions that are not active.
        if candidate and subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    raise NotToBeRun(f"no Python {minor} on this machine")


class Environment:
    def __init__(self, versions: Versions, minor: str) -> None:
        self.versions = versions
        self.minor = minor
        self.directory = HOME / f"{versions}-{minor}"
        self.python = self.directory / "bin" / "python"

    def prepare(self) -> None:
        """Build it unless it is there and up to date. Raises `NotToBeRun`, with pip's last line when pip failed."""
        ready, fingerprint = self.directory / ".ready", self._fingerprint()
        if ready.exists() and ready.read_text() == fingerprint:
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        constraint = self.directory / "constraints.txt"
        constraint.write_text("\n".join(constraints(self.versions)) + "\n")
        self._run([python_of(self.minor), "-m", "venv", str(self.directory)])
        # Not compiled: only what the tests import is, as they do.
        options = ["-q", "--disable-pip-version-check", "--no-compile", "-c", str(constraint)]
        pip = [str(self.python), "-m", "pip", "install", *options]
        self._run([*pip, "--upgrade", "pip", "hatchling", "editables"])
        editable = ["--no-build-isolation", "--group", "dev", "--editable", ".[embedded]"]
        self._run([*pip, *editable, *wanted(self.versions)])
        ready.write_text(fingerprint)

    def installed(self) -> dict[str, str]:
        command = [str(self.python), "-c", VERSIONS_OF, *SHOWN]
        found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    def _fingerprint(self) -> str:
        made_of = [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
        if self.versions is not Versions.PINNED:
            made_of.append(datetime.datetime.now(datetime.UTC).date().isoformat())  # what is newest changes
        return hashlib.sha256("\0".join(made_of).encode()).hexdigest()

    def _run(self, command: list[str]) -> None:
        ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode != 0:
            reason = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or [ended.stderr]
            raise NotToBeRun(f"cannot be installed: {' '.join(reason)[:600]}")
