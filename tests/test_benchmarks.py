"""The benchmarks still run; what they measure is another matter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_benchmark_of_waiting_prints_every_section() -> None:
    command = [sys.executable, "-m", "benchmarks.waiting", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    sections = ["Wake latency", "Waiters, idle", "All rows changed at once", "Writers' throughput", "Targets"]
    assert titles == [f"== {section}" for section in sections]
    assert done.stdout.count("load average") == 4
    for package, name in {"fastapi_toolsets": "fastapi-toolsets", "matplotlib": "matplotlib"}.items():
        said = any("Left out" in line and name in line for line in done.stdout.splitlines())
        assert said is (importlib.util.find_spec(package) is None)
