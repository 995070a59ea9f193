"""Measure what a wait costs and how soon it is woken, and write it into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from redis import Redis

from benchmarks.waiting import idle, latency, waves, writers
from benchmarks.waiting.page import FIGURE, PAGE, rewrite
from benchmarks.waiting.plot import draw
from benchmarks.waiting.report import TARGETS_HEAD, Section, Table
from benchmarks.waiting.scale import FULL, QUICK
from benchmarks.waiting.stage import installed, opened, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.waiting.scale import Scale
    from benchmarks.waiting.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SECTIONS: list[tuple[Callable[[Stage, Scale], Any], Callable[[Any, Scale], Section]]] = [
    (latency.measure, latency.report),
    (idle.measure, idle.report),
    (waves.measure, waves.report),
    (writers.measure, writers.report),
]
PACKAGES = {"sqlalchemy": "SQLAlchemy", "asyncpg": "asyncpg", "redis": "redis-py", "uvloop": "uvloop"}
BENCH_ONLY = {"fastapi_toolsets": "fastapi-toolsets", "matplotlib": "matplotlib"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a minute, whose figures are worth nothing"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where benchmarks.md is")
    options = parser.parse_args(arguments)
    began, sources = monotonic(), _sources()
    with opened() as stage:
        machine = _machine(stage)
        print(f"{machine}\n", flush=True)
        found, sections = _measured(stage, QUICK if options.quick else FULL)
    targets = Table(TARGETS_HEAD, [target.row() for section in sections for target in section.targets])
    print(f"== Targets\n\n{targets.text()}\n\n{monotonic() - began:.0f} s in all")
    if missing := [name for package, name in BENCH_ONLY.items() if not installed(package)]:
        print(f"Left out, since they are not installed: {', '.join(missing)}; make bench-waiting has them")
    if options.quick:
        _try_drawing(found)
    elif missing:
        print(f"{PAGE} is not rewritten: it shows whole runs only")
    elif _sources() != sources:
        print(f"{PAGE} is not rewritten: processes of this run have started with different code")
    else:
        draw(options.docs / FIGURE, *found)
        parts = ["### Targets", targets.markdown(), machine, *(section.markdown() for section in sections)]
        rewrite(options.docs / PAGE, "\n\n".join(parts))


def _measured(stage: Stage, scale: Scale) -> tuple[list[Any], list[Section]]:
    found, sections = [], []
    for measure, report in SECTIONS:
        before = os.getloadavg()[0]
        found.append(measure(stage, scale))
        sections.append(replace(report(found[-1], scale), load=(before, os.getloadavg()[0])))
        print(sections[-1].text(), flush=True)
    return found, sections


def _try_drawing(found: list[Any]) -> None:
    if installed("matplotlib"):
        with tempfile.TemporaryDirectory() as directory:
            draw(Path(directory) / FIGURE, *found)


def _sources() -> dict[Path, int]:
    """When each file was written."""
    files = [path for name in ("benchmarks", "coord") for path in (ROOT / name).rglob("*.py")]
    return {path: path.stat().st_mtime_ns for path in files}


def _machine(stage: Stage) -> str:
    async def postgresql() -> str:
        async with stage.connection() as connection:
            server: str = await connection.fetchval("SHOW server_version")
            return server

    with Redis.from_url(stage.redis_url) as redis:
        valkey = redis.info("server")["valkey_version"]
    versions = [f"{name} {version(package)}" for package, name in PACKAGES.items() if installed(package)]
    servers = f"PostgreSQL {run(postgresql())} (fsync on, its default settings), Valkey {valkey}"
    python = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{python}; {servers}; {', '.join(versions)}. Servers, waiters and writers share the cores."


if __name__ == "__main__":
    main()
