"""PostgreSQL's files, made once for all tests of a run: initdb takes more CPU than most of them."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from coord.dev.embedded import PostgreSQL

if TYPE_CHECKING:
    from typing import IO


@functools.cache
def _made() -> Path:
    """By the first process of the run that needs them, and deleted by the last one that has used them."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)
    server = PostgreSQL(Path(tempfile.gettempdir()) / f"coord-cluster-{run}", settings={"fsync": "off"})
    users = Path(f"{server.directory}.users").open("w")  # noqa: SIM115 - open for as long as the process lives
    with Path(f"{server.directory}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        if not server.data.exists():
            with server:
                """It is stopped before anybody copies it."""
    atexit.register(_leave, server.directory, users)
    return server.data


def _leave(directory: Path, users: IO[str]) -> None:
    with Path(f"{directory}.lock").open("w") as lock, users, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory)
        for file in (users, lock):
            Path(file.name).unlink()


def lay(directory: Path) -> Path:
    """Whose `PostgreSQL(directory)` finds what its first start would have made; with its owner and modes."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", _made(), directory], check=True)
    return directory
