"""Programs that tests start: each is waited for, also when its test fails or is cancelled.

A process that nobody has waited for is a ResourceWarning in whatever test the garbage is collected in.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@contextlib.asynccontextmanager
async def started(*command: str | Path, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """What still runs when the block ends is killed."""
    process = await asyncio.create_subprocess_exec(*command, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def ended(*command: str | Path, **options: Any) -> tuple[int, str, str]:
    """Its status, and what it has written to stdout and stderr."""
    pipes: dict[str, Any] = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    async with started(*command, **{**pipes, **options}) as process:
        out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (out or b"").decode(), (error or b"").decode()
