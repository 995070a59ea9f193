"""`make release-check`: what is about to be published, built, installed alone, run and audited.

Ends with 1 if a check has failed. What could not be looked up is said as that, and is no failure but with `--strict`,
as for a release: then the exit status is 2.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import venv
from pathlib import Path
from typing import TYPE_CHECKING

from tests.pages import FILE, blocks
from tests.project import Dev, until
from tests.shop import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

LICENCES = re.compile(r"MIT|BSD|Apache|PSF|Python|ISC|0BSD|Unlicense|Zlib|PostgreSQL", re.IGNORECASE)
NOT_OURS = ("pip", "setuptools", "coord")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


class Failed(Exception):
    """A check did not hold."""


class NotChecked(Exception):
    """A check could not be made."""


def _run(*command: str | Path, cwd: Path = ROOT) -> str:
    ended = subprocess.run([*map(str, command)], check=False, cwd=cwd, capture_output=True, text=True, timeout=600)
    if ended.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}\n{ended.stdout}{ended.stderr}")
    return ended.stdout


def changelog(_: Path) -> str:
    """The version has a section with a date, below an "Unreleased"."""
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heads[0] != "Unreleased":
        raise Failed("CHANGELOG.md does not begin with Unreleased")
    found = re.fullmatch(rf"{re.escape(VERSION)} \((\d{{4}}-\d\d-\d\d)\)", heads[1])
    if found is None:
        raise Failed(f"CHANGELOG.md has no '## {VERSION} (date)' below Unreleased, but {heads[1]!r}")
    return f"{VERSION} of {datetime.date.fromisoformat(found[1])}"


def built(directory: Path) -> str:
    """A wheel and a source archive."""
    _run(sys.executable, "-m", "hatchling", "build", "--directory", directory / "dist")
    return ", ".join(sorted(path.name for path in (directory / "dist").iterdir()))


def installed(directory: Path) -> str:
    """The wheel alone, with what its metadata names, in an empty environment."""
    venv.create(directory / "venv", with_pip=True)
    (wheel,) = (directory / "dist").glob("*.whl")
    python = directory / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "-qq", "--disable-pip-version-check")
    _run(*pip, "install", "--constraint", ROOT / "constraints.txt", f"{wheel}[embedded]", "uvicorn", cwd=directory)
    _run(*pip, "check", cwd=directory)
    where = _run(python, "-c", "import coord; print(coord.__file__)", cwd=directory).strip()
    if not Path(where).is_relative_to(directory):
        raise Failed(f"coord is imported from {where}")
    return "pip check has nothing to say"


def quickstart(directory: Path) -> str:
    """The README's three files with `coord dev` of that environment, and its curl line as a request."""
    project = directory / "project"
    project.mkdir()
    for block in blocks(ROOT / "README.md", "python"):
        if (match := FILE.match(block.text)) is not None:
            (project / match[1]).write_text(block.text)
    dev = Dev(project, "--workers", "2", python=str(directory / "venv" / "bin" / "python"))
    try:
        until(lambda: "ready at" in dev.output, lambda: dev.output, within=60)
        request = urllib.request.Request(f"http://127.0.0.1:{dev.port}/orders", method="POST")
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
    finally:
        dev.process.send_signal(signal.SIGINT)
        dev.process.wait(40)
    if answer != {"id": 1, "status": "fulfilled", "invoice_number": 1}:
        raise Failed(f"the README's example answers {answer}")
    return f"POST /orders: {answer}"


def licences(directory: Path) -> str:
    """Of everything that the wheel brings: one that lets it be used under other licences."""
    python = directory / "venv" / "bin" / "python"
    listed = _run(sys.executable, "-m", "piplicenses", f"--python={python}", "--format=json", "--from=mixed")
    found = {each["Name"]: each["License"] for each in json.loads(listed) if each["Name"] not in NOT_OURS}
    if refused := {name: licence for name, licence in found.items() if not LICENCES.search(licence)}:
        raise Failed(f"look at these licences: {refused}")
    return f"{len(found)} packages: {', '.join(sorted(set(found.values())))}"


def vulnerabilities(directory: Path) -> str:
    """Known ones of everything that the wheel brings. Without the service of vulnerabilities nothing is known."""
    python = directory / "venv" / "bin" / "python"
    frozen = _run(python, "-m", "pip", "freeze", "--exclude", "coord")
    requirements = directory / "requirements.txt"
    requirements.write_text(frozen)
    command = (sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--strict", "--timeout", "20")
    try:
        _run(*command, "--progress-spinner=off", "--requirement", requirements)
    except Failed as error:
        if re.search(r"\d+ known vulnerabilit", str(error)):
            raise
        last = str(error).strip().splitlines()[-1][:200]
        raise NotChecked(f"the service of vulnerabilities did not answer for all of them: {last}") from error
    return f"none known of {len(frozen.splitlines())} packages"


CHECKS: tuple[Callable[[Path], str], ...] = (changelog, built, installed, quickstart, licences, vulnerabilities)


def main(*, strict: bool) -> int:
    failed, unknown = [], []
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="coord-release-") as name:
        for check in CHECKS:
            try:
                print(f"ok           {check.__name__}: {check(Path(name))}", flush=True)
            except NotChecked as reason:
                unknown.append(check.__name__)
                print(f"NOT CHECKED  {check.__name__}: {reason}", flush=True)
            except (Failed, OSError, AssertionError, subprocess.TimeoutExpired) as error:
                failed.append(check.__name__)
                print(f"FAILED       {check.__name__}: {error}", flush=True)
    print(verdict(failed, unknown))
    return 1 if failed else 2 if unknown and strict else 0


def verdict(failed: list[str], unknown: list[str]) -> str:
    if failed:
        return f"{VERSION} is not to be released: {', '.join(failed)}"
    if unknown:
        return f"{VERSION}: what was checked holds; before it is released, check {', '.join(unknown)}"
    return f"{VERSION} may be released"


if __name__ == "__main__":
    sys.exit(main(strict="--strict" in sys.argv[1:]))
