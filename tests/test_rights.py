"""What a role of PostgreSQL has to be allowed: what docs/operation.md names, and nothing else."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from coord.jobs.model import Ledger
from tests.pages import prose
from tests.shop import ROOT
from tests.workers import Notes, Office, opened, process

if TYPE_CHECKING:
    import asyncpg

pytestmark = [pytest.mark.usefixtures("tables"), pytest.mark.slow]


def documented() -> tuple[str, str]:
    """On the ledger's tables, and on one of them that is only read."""
    found = re.search(r"\*\*Rights\*\* of the role: (.*?) on the ledger's tables \(on `(\w+)` only `SELECT`\)", page())
    assert found is not None
    return found[1].replace("`", ""), found[2]


def page() -> str:
    return prose(ROOT / "docs" / "operation.md")


async def test_the_documented_rights_are_enough_for_jobs_locks_and_the_rescue_of_a_killed_worker(
    office: Office, notes: Notes, observer: asyncpg.Connection
) -> None:
    rights, read = documented()
    ledger = ", ".join(name for name in Ledger.metadata.tables if name != read)
    await observer.execute(f"""
        CREATE ROLE clerk LOGIN;
        GRANT {rights} ON {ledger} TO clerk;
        GRANT SELECT ON {read} TO clerk;
        GRANT SELECT, INSERT ON effects TO clerk;
        GRANT SELECT, UPDATE ON users TO clerk;
    """)
    url = make_url(office.database_url).set(username="clerk").render_as_string(hide_password=False)
    try:
        async with opened(url, office.redis_url) as clerks, process(clerks, notes) as first:
            job = await clerks.enqueue("hold_lock", "go")
            await notes.say(job, "locked")
            async with process(clerks, notes):
                first.signal(signal.SIGKILL)
                await notes.say(job, "locked", times=2)
                notes.let("go")
                assert (await clerks.final(job)).state == "done"
            assert await clerks.effects(job) == [2]
    finally:
        await observer.execute("DROP OWNED BY clerk; DROP ROLE clerk")
