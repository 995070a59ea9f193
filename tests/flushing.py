"""Tables whose rows may travel with their commit, and sessions of both drivers that know them."""

from __future__ import annotations

from collections.abc import Iterator  # noqa: TC003 - SQLAlchemy reads the annotations
from contextlib import asynccontextmanager
from datetime import date, datetime, timedelta  # noqa: TC003
from decimal import Decimal  # noqa: TC003
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Enum,
    ForeignKey,
    Numeric,
    Table,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, INET, JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from coord.postgresql.engine import prepare
from tests.ledger import a_task, ledger  # noqa: F401 - a fixture
from tests.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncpg import Connection

    SessionMaker = async_sessionmaker[AsyncSession]


NOTHING = """
    CREATE OR REPLACE FUNCTION flushed_nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER nothing BEFORE INSERT ON flushed_stamps FOR EACH ROW EXECUTE FUNCTION flushed_nothing();
"""


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    """Its key comes from the application: SQLAlchemy asks nothing back."""

    __tablename__ = "flushed_parcels"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    label: Mapped[str | None] = mapped_column(unique=True)
    inside: Mapped[int | None] = mapped_column(ForeignKey("flushed_parcels.id", deferrable=True, initially="DEFERRED"))


class Stamp(Base):
    __tablename__ = "flushed_stamps"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Ink(Base):
    __tablename__ = "flushed_inks"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Paper(Base):
    __tablename__ = "flushed_papers"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    around_id: Mapped[int | None] = mapped_column(ForeignKey("flushed_parcels.id"))
    around: Mapped[Parcel | None] = relationship()
    inks: Mapped[list[Ink]] = relationship(
        secondary=Table(
            "flushed_papers_inks",
            Base.metadata,
            Column("paper", ForeignKey("flushed_papers.id"), primary_key=True),
            Column("ink", ForeignKey("flushed_inks.id"), primary_key=True),
        )
    )


class Coupon(Base):
    __tablename__ = "flushed_coupons"
    codes: ClassVar[Iterator[int]]
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    code: Mapped[int | None] = mapped_column(unique=True, default=lambda: next(Coupon.codes))


class Letter(Base):
    __tablename__ = "flushed_letters"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str | None] = mapped_column(Enum("a", "b", name="flushed_kind"))


class Numbered(Base):
    __tablename__ = "flushed_numbered"
    numbers: ClassVar[Iterator[int]]
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, default=lambda: next(Numbered.numbers))


class Ticket(Base):
    """Its key comes from the database."""

    __tablename__ = "flushed_tickets"
    id: Mapped[int] = mapped_column(primary_key=True)


class Values(Base):
    __tablename__ = "flushed_values"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    text: Mapped[str | None]
    number: Mapped[int | None] = mapped_column(BigInteger)
    real: Mapped[float | None]
    exact: Mapped[Decimal | None] = mapped_column(Numeric(20, 6))
    at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    day: Mapped[date | None]
    lasts: Mapped[timedelta | None]
    truth: Mapped[bool | None]
    raw: Mapped[bytes | None]
    json: Mapped[Any] = mapped_column(JSON, nullable=True)
    jsonb: Mapped[Any] = mapped_column(JSONB, nullable=True)
    list: Mapped[Any] = mapped_column(ARRAY(BigInteger), nullable=True)
    address: Mapped[Any] = mapped_column(INET, nullable=True)


@pytest.fixture(scope="module")
async def made(engine: AsyncEngine) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    yield
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


@pytest.fixture
async def proxy(database_url: str, made: None, observer: Connection) -> AsyncIterator[Proxy]:
    await observer.execute("TRUNCATE " + ", ".join(Base.metadata.tables))
    async with Proxy(database_url).opened() as proxy:
        yield proxy


@asynccontextmanager
async def warm(url: str, **options: Any) -> AsyncIterator[SessionMaker]:
    """Sessions on one connection that knows the statements."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0, **options)
    prepare(engine)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    Coupon.codes, Numbered.numbers = iter([-1, -2, -3]), iter([-1, -2, -3])
    for number in (0, -1, -2):
        async with begun(sessions) as session:
            parcel, inks = Parcel(id=number), [Ink(id=number)]
            session.add_all([parcel, Stamp(id=number), Values(), Paper(id=number, around=parcel, inks=inks)])
            session.add_all([Coupon(id=number), Numbered()])
            await session.commit()
            await session.execute(text("SELECT 7"))
            session.add(Values())
            await session.commit()
            await session.get(Parcel, number)
    yield sessions
    await engine.dispose()


@pytest.fixture
async def sessions(proxy: Proxy) -> AsyncIterator[SessionMaker]:
    async with warm(proxy.url) as sessions:
        yield sessions


@pytest.fixture(params=["coord's connections", "asyncpg's"])
async def either(request: pytest.FixtureRequest, proxy: Proxy) -> AsyncIterator[SessionMaker]:
    """What holds with these has to hold with those."""
    options = {"connect_args": {"connection_class": asyncpg.Connection}} if request.param == "asyncpg's" else {}
    async with warm(proxy.url, **options) as sessions:
        yield sessions


@asynccontextmanager
async def begun(sessions: SessionMaker) -> AsyncIterator[AsyncSession]:
    """A session whose transaction has begun, as `enqueue` begins one."""
    async with sessions() as session:
        await session.execute(text("SELECT 7"))
        yield session


async def labels(observer: Connection) -> list[str]:
    rows = await observer.fetch("SELECT label FROM flushed_parcels WHERE id > 0 ORDER BY id")
    return [row["label"] for row in rows]


@asynccontextmanager
async def listening(session: AsyncSession, name: str, listener: Callable[..., None]) -> AsyncIterator[None]:
    event.listen(session.sync_session, name, listener)
    yield
    event.remove(session.sync_session, name, listener)


async def is_usable(sessions: SessionMaker, observer: Connection) -> bool:
    """The connection, for another row that goes ahead, and for the next."""
    for number in (900, 901):
        async with begun(sessions) as session:
            session.add(Parcel(id=number, label=str(number)))
            await session.commit()
    return (await labels(observer))[-2:] == ["900", "901"]


async def refused(session: AsyncSession, *rows: Any) -> None:
    session.add_all(rows)
    with pytest.raises(IntegrityError):
        await session.commit()
