"""What a type checker says of `enqueue`: a task's own arguments are checked where it is enqueued."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.shop import ROOT

if TYPE_CHECKING:
    from pathlib import Path

CALLS = """
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from arq.worker import func
from sqlalchemy.ext.asyncio import AsyncSession

from coord import Call, Job, TaskOptions, call, enqueue, enqueue_many, job_transaction, set_result, task_options


async def fulfil(ctx: dict[Any, Any], order_id: int, *, fast: bool = False) -> str:
    async with job_transaction(ctx) as session:
        await set_result(session, order_id)
        await set_result(ctx, order_id)  # refused
    return ""


async def nothing(ctx: Any) -> None: ...


def plain(ctx: Any, order_id: int) -> None: ...


async def calls(session: AsyncSession) -> None:
    job: Job = await enqueue(session, fulfil, 5)
    identity: UUID = job.id
    await enqueue(session, fulfil, 5, fast=True)
    await enqueue(session, fulfil, order_id=5)
    await enqueue(session, nothing)
    one: Call = call(fulfil, 5, fast=True)
    many: list[Job] = await enqueue_many(session, [one, call(task_options(fulfil, priority=1), 5), call("fulfil", "x")])
    call(fulfil, "5")  # refused
    call(fulfil, 5, slow=True)  # refused
    await enqueue_many(session, [fulfil])  # refused
    await enqueue(session, fulfil, "5")  # refused
    await enqueue(session, fulfil)  # refused
    await enqueue(session, fulfil, 5, 6)  # refused
    await enqueue(session, fulfil, 5, fast="yes")  # refused
    await enqueue(session, fulfil, 5, slow=True)  # refused
    await enqueue(session, nothing, 5)  # refused
    await enqueue(session, plain, 5)  # refused
    await enqueue(session, 5, 5)  # refused
    await enqueue(fulfil, 5)  # refused
    await enqueue(session, fulfil, 5, delay=5)  # refused

    options = task_options(fulfil, unique_key="k", delay=timedelta(1), queue="q", max_attempts=3, timeout=2.5)
    await enqueue(session, options, 5, fast=True)
    await enqueue(session, options, "5")  # refused
    await enqueue(session, options)  # refused
    await enqueue(session, options, 5, slow=True)  # refused
    await enqueue(session, task_options(fulfil, delay=datetime.now(UTC)), 5)
    await enqueue(session, task_options(fulfil, delay="5"), 5)  # refused
    await enqueue(session, task_options(fulfil, unique_key=5), 5)  # refused
    await enqueue(session, task_options(fulfil, retries=5), 5)  # refused

    await enqueue(session, "fulfil", "anything", at=all)
    await enqueue(session, task_options("fulfil", max_attempts=1), "anything", at=all)
    await enqueue(session, func(fulfil, name="other"), "anything", at=all)
    wrong: str = await enqueue(session, "fulfil")  # refused


kept: TaskOptions[int] = task_options(nothing)  # refused
"""


@pytest.mark.slow
def test_mypy_refuses_the_wrong_calls_and_no_other(tmp_path: Path) -> None:
    module = tmp_path / "calls.py"
    module.write_text(CALLS)
    command = ["-m", "mypy", "--config-file", "pyproject.toml", "--no-pretty", "--no-color-output", str(module)]
    found = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stderr or found.stdout
    refused = {
        int(line) for line in re.findall(r"/calls\.py:(\d+): error", found.stdout)
    }  # mypy may know it by an old path
    wrong = {n for n, line in enumerate(CALLS.splitlines(), start=1) if line.endswith("# refused")}
    assert refused == wrong, found.stdout
