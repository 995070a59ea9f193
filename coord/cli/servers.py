"""The servers that a command talks to, by their URLs; an error of theirs is one line that names the URL, masked."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from coord.errors import message_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from sqlalchemy import URL

CONNECT_SECONDS = 5.0
url_option = click.option(
    "--url", envvar="COORD_DATABASE_URL", help="the database, COORD_DATABASE_URL unless given", metavar="URL"
)
json_option = click.option("--json", "as_json", is_flag=True, help="machine-readable")


def dotted(_ctx: click.Context, _option: click.Parameter, given: str | None) -> str | None:
    """Of `--worker`: what it names is imported much later, by a process whose error says less."""
    if given is not None and (":" in given or not all(given.rpartition("."))):
        raise click.UsageError(f"--worker is module.Class, as for arq, not {given}")
    return given


def checked(given: str | None) -> URL:
    """`ClickException` for what cannot be one."""
    if not given:
        raise click.ClickException("name the database with --url or COORD_DATABASE_URL")
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):  # not shown: what cannot be parsed may hold a password anywhere
        message = "the URL is malformed; it looks like postgresql+asyncpg://user:password@host:5432/database"
        raise click.ClickException(message) from None
    if url.drivername != "postgresql+asyncpg":
        raise click.ClickException(f"the URL needs the driver postgresql+asyncpg, not {url.drivername}")
    return url


@asynccontextmanager
async def session_of(given: str | None) -> AsyncIterator[AsyncSession]:
    """Committed at the block's end."""
    url = checked(given)
    engine = create_async_engine(url, connect_args={"timeout": CONNECT_SECONDS})
    try:
        async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
            yield session
    except click.ClickException:
        raise
    except (LookupError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except Exception as error:
        raise click.ClickException(f"cannot use {masked(url)}: {reason(error)}") from error
    finally:
        await engine.dispose()


def masked(url: URL) -> str:
    return url.set(query={}).render_as_string(hide_password=True)


def reason(error: BaseException) -> str:
    """PostgreSQL's own words, beneath the driver's and SQLAlchemy's."""
    notes = "; ".join(getattr(error, "__notes__", ()))
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {CONNECT_SECONDS:g} s"
    return f"{message_of(error)}{notes and f'; {notes}'}"


def asynchronous(work: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    @wraps(work)
    def run(*arguments: Any, **options: Any) -> Any:
        return asyncio.run(work(*arguments, **options))

    return run
