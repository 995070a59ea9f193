"""The plugin, in pytest runs of their own: every kind of event loop, xdist, and what is left after each run."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy import text

from coord.testing.servers import DATABASE, REDIS, open_host
from tests.project import until
from tests.shop import dsn_of

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection

pytestmark = pytest.mark.slow

CONFTEST = """
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from coord import Job, enqueue, job_transaction
from coord.testing import Drained, assert_enqueued, drain_jobs, perform


@pytest.fixture(scope="session")
def coord_schema():
    def create(connection):
        connection.execute(text("CREATE TABLE notes (text text)"))
        with Path("created").open("a") as file:
            file.write("once\\n")

    return create


async def note(ctx, words):
    async with job_transaction(ctx) as session:
        await session.execute(text("INSERT INTO notes VALUES (:words)"), {"words": words})


async def used(session, maker):
    async with maker() as handler:
        await enqueue(handler, note, "drained")
        await handler.commit()
    await assert_enqueued(session, note, "drained")
    await perform(note, "performed", session=session)
    assert await drain_jobs([note], session=session) == Drained(done=1)
    assert (await session.scalar(text("SELECT count(*) FROM notes"))) == 2
    assert (await session.scalar(select(func.count()).select_from(Job))) == 2
"""
BODY = """
import asyncio
import pytest
from conftest import used
{before}
{mark}
async def test_first(coord_session, coord_session_maker):
    await used(coord_session, coord_session_maker)
{mark}
async def test_second(coord_session, coord_session_maker):
    await used(coord_session, coord_session_maker)
"""
STRICT, AUTO = ("-o", "asyncio_mode=strict"), ("-o", "asyncio_mode=auto")
OF_THE_SESSION = ("-o", "asyncio_default_test_loop_scope=session")
MODES = {
    "strict": (STRICT, "@pytest.mark.asyncio", ""),
    "strict, marked with the module's loop": (STRICT, '@pytest.mark.asyncio(loop_scope="module")', ""),
    "strict, the session's loop": ((*STRICT, *OF_THE_SESSION), "@pytest.mark.asyncio", ""),
    "auto, the session's loop": ((*AUTO, *OF_THE_SESSION), "", ""),
    "auto, fixtures in the session's loop only": ((*AUTO, "-o", "asyncio_default_fixture_loop_scope=session"), "", ""),
    "anyio": (STRICT, "@pytest.mark.anyio", "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"),
    "anyio without pytest-asyncio": (
        ("-p", "no:asyncio"),
        "@pytest.mark.anyio",
        "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n",
    ),
}
"""`XDIST` and what fails below are run in auto mode with a loop for each test."""


class Runs:
    """Runs pytest in a directory of its own, on this suite's servers unless it is to have its own."""

    def __init__(self, directory: Path, database_url: str, redis_url: str) -> None:
        self.directory = directory
        self.servers = {"COORD_TEST_DATABASE_URL": database_url, "COORD_TEST_REDIS_URL": redis_url}
        self.write("pytest.ini", "[pytest]\nfilterwarnings = error\n")
        self.write("conftest.py", CONFTEST)

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def begin(self, *options: str, own_servers: bool = False, **variables: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("COORD_", "PYTEST_"))}
        # Unset, pytest-asyncio warns.
        fixtures = () if "no:asyncio" in options else ("-o", "asyncio_default_fixture_loop_scope=function")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:schemathesis",
            *fixtures,
            *options,
        ]
        env = {**clean, **({} if own_servers else self.servers), **variables}
        return subprocess.Popen(
            command, cwd=self.directory, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def end(self, *options: str, own_servers: bool = False, **variables: str) -> str:
        """What a run says, once it has ended."""
        with self.begin(*options, own_servers=own_servers, **variables) as process:
            try:
                said, _ = process.communicate(timeout=100)
            finally:
                process.kill()
        return said


@pytest.fixture
def runs(tmp_path: Path, database_url: str, redis_url: str) -> Runs:
    return Runs(tmp_path, database_url, redis_url)


async def databases(observer: asyncpg.Connection) -> set[str]:
    return {
        name for (name,) in await observer.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'coord_test%'")
    }


@pytest.mark.parametrize("mode", MODES)
async def test_tests_of_every_kind_of_event_loop_are_rolled_back(
    runs: Runs, observer: asyncpg.Connection, mode: str
) -> None:
    before = await databases(observer)
    options, mark, first = MODES[mode]
    runs.write("test_it.py", BODY.format(mark=mark, before=first))
    assert re.search(r"^2 passed", said := runs.end(*options), re.MULTILINE), said
    assert await databases(observer) == before


def test_a_run_that_asks_for_no_fixture_imports_nothing_of_coord(runs: Runs) -> None:
    runs.write("conftest.py", "")
    runs.write(
        "test_it.py",
        "import sys\n\ndef test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.hasplugin('coord')\n"
        "    heavy = {'coord', 'sqlalchemy', 'asyncpg', 'arq', 'fastapi', 'redis'}\n"
        "    assert not heavy & {name.split('.')[0] for name in sys.modules}\n",
    )
    assert re.search(r"^1 passed", said := runs.end(), re.MULTILINE), said


XDIST = """
import pytest
from pathlib import Path
from sqlalchemy import text
from conftest import used

@pytest.mark.parametrize("number", range(6))
async def test_it(coord_session, coord_session_maker, coord_servers, number):
    await used(coord_session, coord_session_maker)
    name = await coord_session.scalar(text("SELECT current_database()"))
    with Path("used").open("a") as file:
        file.write(f"{name} {coord_servers.redis_url}\\n")

async def test_a_database_of_its_own(coord_database):
    with Path("used").open("a") as file:
        file.write(f"{coord_database.database_url.rsplit('/', 1)[1]} {coord_database.redis_url}\\n")
"""


async def test_each_worker_of_xdist_has_a_database_from_one_template_and_a_redis_of_its_own(
    runs: Runs, observer: asyncpg.Connection
) -> None:
    before = await databases(observer)
    runs.write("test_it.py", XDIST)
    said = runs.end("-n", "2", "--dist", "each", *AUTO)
    assert re.search(r"^14 passed", said, re.MULTILINE), said
    used = {*(runs.directory / "used").read_text().splitlines()}
    assert len(used) == 4
    assert len({line.split()[0] for line in used}) == len({line.split()[1] for line in used}) == 4
    assert (runs.directory / "created").read_text() == "once\n"
    assert await databases(observer) == before


async def test_a_worker_of_xdist_that_ends_leaves_the_template_to_those_that_have_no_database_just_now(
    runs: Runs, observer: asyncpg.Connection
) -> None:
    """One whose tests have a database each has none between two of them."""
    before = await databases(observer)
    run = {**runs.servers, "PYTEST_XDIST_TESTRUNUID": "fedcba9876543210"}

    def schema(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE notes (text text)"))

    with open_host(schema, {**run, "PYTEST_XDIST_WORKER": "gw0"}) as remaining:
        with open_host(schema, {**run, "PYTEST_XDIST_WORKER": "gw1"}):
            pass
        with remaining.servers() as servers:
            connection = await asyncpg.connect(dsn_of(servers.database_url))
            assert await connection.fetchval("SELECT count(*) FROM notes") == 0
            await connection.close()
    assert await databases(observer) == before


async def test_a_run_that_fails_leaves_no_database(runs: Runs, observer: asyncpg.Connection) -> None:
    before = await databases(observer)
    runs.write("test_it.py", BODY.format(mark="", before="") + "    assert False\n")
    assert re.search(r"^1 failed, 1 passed", said := runs.end(*AUTO), re.MULTILINE), said
    assert await databases(observer) == before


async def test_a_schema_that_fails_is_told_and_leaves_no_database(runs: Runs, observer: asyncpg.Connection) -> None:
    before = await databases(observer)
    runs.write("conftest.py", CONFTEST.replace("CREATE TABLE notes (text text)", "CREATE TABLE notes (nonsense)"))
    runs.write("test_it.py", BODY.format(mark="", before=""))
    said = runs.end(*AUTO)
    assert "2 errors" in said
    assert "syntax error" in said
    assert await databases(observer) == before


def test_a_run_that_is_killed_leaves_no_server(runs: Runs) -> None:
    runs.write("conftest.py", "")
    runs.write(
        "test_it.py",
        "import time\nfrom pathlib import Path\n\ndef test_it(coord_servers):\n"
        "    Path('urls.part').write_text(f'{coord_servers.database_url} {coord_servers.redis_url}')\n"
        "    Path('urls.part').rename('urls')\n"
        "    time.sleep(60)\n",
    )
    urls = runs.directory / "urls"
    with runs.begin(own_servers=True) as process:
        until(urls.exists, "the servers have not started", within=40)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)
    for url in urls.read_text().split():
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        until(partial(is_closed, port), f"port {port} is still open")


def is_closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_without_an_event_loop_it_says_what_is_missing(runs: Runs) -> None:
    runs.write("test_it.py", "def test_it(coord_session):\n    pass\n")
    said = runs.end("-p", "no:asyncio", "-p", "no:anyio")
    assert "coord_session_maker needs an event loop: of pytest-asyncio, or of anyio's plugin" in said


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (DATABASE, "postgresql://localhost/postgres", "needs the driver postgresql+asyncpg, not postgresql"),
        (DATABASE, "secret", "malformed"),
        (REDIS, "localhost", "malformed"),
    ],
)
def test_a_variable_that_is_malformed_is_named(variable: str, value: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{variable}: {said}")):
        with open_host(lambda _connection: None, {variable: value}):
            pytest.fail("it was taken")


def test_a_run_whose_variable_is_malformed_says_so(runs: Runs) -> None:
    runs.write("test_it.py", "def test_it(coord_servers):\n    pass\n")
    assert "COORD_TEST_REDIS_URL: malformed" in runs.end(COORD_TEST_REDIS_URL="localhost")


def test_a_redis_that_has_too_few_databases_is_told(runs: Runs) -> None:
    runs.write("test_it.py", "def test_it(coord_servers):\n    pass\n")
    said = runs.end(PYTEST_XDIST_WORKER="gw8", PYTEST_XDIST_TESTRUNUID="0123456789abcdef")
    assert "COORD_TEST_REDIS_URL: its database 17 cannot be emptied" in said
    assert "a Redis serves 7 workers" in said


def test_the_database_of_the_suite_is_not_the_given_one(database_url: str) -> None:
    assert "coord_test_" in dsn_of(database_url)
