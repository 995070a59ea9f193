"""The shop's engine and sessions, for its worker and its API alike."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import create_ledger
from worker.environment import DATABASE, database_url, refuse
from worker.models import Base

MAX_JOBS = 10
POOL_SIZE = MAX_JOBS + 2  # a job never waits for a connection
CONNECT_SECONDS = 5.0

engine = create_async_engine(
    database_url(),
    pool_size=POOL_SIZE,
    max_overflow=0,
    isolation_level="READ COMMITTED",  # each statement sees what the last holder of a lock has committed
    connect_args={"timeout": CONNECT_SECONDS},
)
session_maker = async_sessionmaker(bind=engine, expire_on_commit=False)


async def open_database() -> None:
    """Create the tables that are missing, however many processes start at once; end the process when that fails."""
    try:
        async with engine.begin() as connection:
            await create_ledger(connection)  # under a lock, which lasts until the commit
            await connection.run_sync(Base.metadata.create_all)
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator needs one line
        shown = engine.url.set(query={}).render_as_string(hide_password=True)
        refuse(DATABASE, f"cannot use {shown}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no PostgreSQL answered within {CONNECT_SECONDS:g} s"
    while error.__cause__ is not None:  # PostgreSQL's own words, beneath the driver's and SQLAlchemy's
        error = error.__cause__
    return str(error) or type(error).__name__
