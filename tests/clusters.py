"""PostgreSQL's files, made once for all tests of a process: initdb takes more CPU than most of them."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from coord.dev.embedded import PostgreSQL


@functools.cache
def _made() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="coord-cluster-")).resolve()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    with PostgreSQL(directory, settings={"fsync": "off"}) as server:
        return server.data


def lay(directory: Path) -> Path:
    """Whose `PostgreSQL(directory)` finds what its first start would have made; with its owner and modes."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", _made(), directory], check=True)
    return directory
