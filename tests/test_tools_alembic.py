"""Alembic itself, as docs/tenants.md has it: a migration that runs, then finds nothing, and leaves the ledger be."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import asyncpg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import create_ledger
from tests import warm
from tests.pooler import UNTOLD
from tests.round_trip import application, rename, running
from tests.serving import engine_at
from tests.shop import ROOT, dsn_of, empty_database
from tests.test_migrations import described

if TYPE_CHECKING:
    from pathlib import Path

MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
"""
ALEMBIC = """
import shlex, sys, warnings
from alembic.config import main

warnings.simplefilter("error")
for line in sys.argv[1:]:
    main(shlex.split(line))
"""
BOTH, ALONE = "[Base.metadata, Job.metadata]", "Base.metadata"


class Project:
    """An application's directory with Alembic's own asynchronous template, and the lines that the page adds."""

    def __init__(self, directory: Path, url: str, target: str) -> None:
        self.directory = directory
        (directory / "models.py").write_text(MODELS)
        config = Config(directory / "alembic.ini")
        config.set_main_option("script_location", "migrations")
        command.init(config, str(directory / "migrations"), template="async")
        ini = directory / "alembic.ini"
        ini.write_text(ini.read_text().replace("driver://user:pass@localhost/dbname", url))
        env = directory / "migrations" / "env.py"
        text = env.read_text().replace("target_metadata = None", f"{included()}\ntarget_metadata = {target}")
        if target == ALONE:
            text = text.replace(
                "target_metadata=target_metadata", "target_metadata=target_metadata, include_name=include_name"
            )
        env.write_text(f"from models import Base\nfrom coord import Job\n{text}")

    async def run(self, *commands: str) -> str:
        """One after the other in one process: most of what each takes is imports."""
        status, out, error = await warm.ended("-c", ALEMBIC, *commands, env=os.environ, cwd=self.directory)
        assert status == 0, out + error
        return out

    async def migrate(self, *names: str) -> list[str]:
        """Generate a migration and run it, for each name; the migrations."""
        await self.run(*(line for name in names for line in (f"revision --autogenerate -m {name}", "upgrade head")))
        found = [path.read_text() for path in self.directory.glob("migrations/versions/*.py")]
        return sorted(found, key=lambda text: names.index(text.partition("\n")[0].removeprefix('"""')))

    async def finds_nothing(self) -> bool:
        return "No new upgrade operations detected" in await self.run("check")


def included() -> str:
    """`include_name` as the page has it."""
    page = (ROOT / "docs" / "existing-alembic.md").read_text()
    (block,) = [block for block in page.split("```") if "def include_name" in block]
    return block.removeprefix("python\n")


async def make(url: str, schema: str | None = None) -> None:
    async with engine_at(url) as engine, engine.begin() as connection:
        await create_ledger(connection, schema=schema)


async def test_a_generated_migration_makes_the_ledger_and_nothing_is_left_for_a_second(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with empty_database(database_url) as url, empty_database(database_url) as other:
        project = Project(tmp_path, url, BOTH)
        made, second = await project.migrate("first", "second")
        assert "create_table('coord_jobs'" in made
        assert "create_table('users'" in made
        assert second.partition("def upgrade")[2].count("op.") == 0
        await make(url)
        await make(other)
        observers = [await asyncpg.connect(dsn_of(each)) for each in (url, other)]
        by_alembic, by_coord = [await described(observer) for observer in observers]
        own = {
            kind: [row for row in rows if "users" not in str(row) and "alembic" not in str(row)]
            for kind, rows in by_alembic.items()
        }
        assert own == by_coord
        assert await project.finds_nothing()
        await round_trip(url, redis_url)
        for observer in observers:
            await observer.close()


@pytest.mark.parametrize(("target", "schema"), [(BOTH, None), (ALONE, None), (ALONE, "jobs")])
async def test_a_ledger_that_is_there_is_left_as_it_is(
    database_url: str, redis_url: str, tmp_path: Path, target: str, schema: str | None
) -> None:
    async with empty_database(database_url) as url:
        await make(url, schema)
        observer = await asyncpg.connect(dsn_of(url))
        before = await described(observer, schema or "public")
        project = Project(tmp_path, url, target)
        [made] = await project.migrate("first")
        assert "create_table('users'" in made
        assert "coord_" not in made
        assert await project.finds_nothing()
        await make(url)
        after = await described(observer, schema or "public")
        assert {kind: [row for row in rows if row in after[kind]] for kind, rows in before.items()} == before
        await round_trip(url, redis_url)
        await observer.close()


async def round_trip(url: str, redis_url: str) -> None:
    engine = create_async_engine(url, pool_size=15, **UNTOLD)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    async with running(application(maker, redis_url), [rename], maker, redis_url, url) as http:
        assert (await http.post("/users/1")).json() == "renamed"
    await engine.dispose()
