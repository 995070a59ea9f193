"""Rows that travel with their commit: nobody may be able to tell, but by the round trip that is not there."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator  # noqa: TC003 - SQLAlchemy reads the annotations
from contextlib import asynccontextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
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
    func,
    insert,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, INET, JSONB
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, PendingRollbackError, SAWarning
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, relationship

from coord import Coordinator, enqueue
from coord.postgresql.engine import prepare
from tests.ledger import a_task, ledger  # noqa: F401 - a fixture
from tests.proxy import Proxy
from tests.serving import eventually
from tests.shop import waiting_for_locks

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


# What it saves


async def test_a_row_and_its_commit_take_one_round_trip(
    sessions: SessionMaker, proxy: Proxy, observer: Connection
) -> None:
    async with begun(sessions) as session:
        session.add(Parcel(id=1, label="x" * 100_000))
        before = proxy.round_trips
        await session.commit()
        assert proxy.round_trips == before + 1
    assert len((await labels(observer))[0]) == 100_000


async def test_an_order_and_its_job_take_one_round_trip(
    sessions: SessionMaker,
    proxy: Proxy,
    observer: Connection,
    ledger: None,  # noqa: F811
) -> None:
    """With everybody listening who does in a service."""
    took = []
    async with Coordinator(sessions):
        for number in range(1, 5):
            async with sessions() as session:
                before = proxy.round_trips
                session.add(Parcel(id=number))
                await enqueue(session, a_task, number)
                await session.commit()
                took.append(proxy.round_trips - before)
    assert took[-1] == 1, took
    assert await observer.fetchval("SELECT count(*) FROM coord_jobs") == 4


async def test_what_the_server_has_to_tell_is_waited_for(sessions: SessionMaker, proxy: Proxy) -> None:
    """A flush that somebody asks for, several rows, an UPDATE whose rows are counted."""
    async with begun(sessions) as session:
        session.add(Parcel(id=1))
        before = proxy.round_trips
        await session.flush()
        assert proxy.round_trips == before + 1
        session.add_all([Parcel(id=2), Parcel(id=3)])
        await session.commit()
        before = proxy.round_trips
        (await session.get_one(Parcel, 1)).label = "changed"
        await session.commit()
        assert proxy.round_trips >= before + 2


async def test_values_are_as_they_always_were(sessions: SessionMaker, observer: Connection) -> None:
    values = {
        "text": "é'\"\\ \n\u2028", "number": -(2**63), "real": 0.1 + 0.2, "exact": Decimal("12345678901234.567890"),
        "at": datetime(9999, 12, 31, 23, tzinfo=UTC), "day": date(1, 1, 2), "lasts": timedelta(days=-3, microseconds=7),
        "truth": False, "raw": b"\0\xff", "json": {"a": [1, None]}, "jsonb": ["x"], "list": [1, None, 3],
        "address": "10.0.0.1/32",
    }  # fmt: skip
    ids = []
    for is_ahead in (False, True):
        async with begun(sessions) as session:
            session.add(row := Values(**values))
            if not is_ahead:
                await session.flush()
            await session.commit()
            ids.append(row.id)
    one, other = [dict(await observer.fetchrow("SELECT * FROM flushed_values WHERE id = $1", id_)) for id_ in ids]
    assert one.pop("id") != other.pop("id")
    assert one == other
    assert json.loads(other["json"]) == values["json"]


async def test_a_codec_of_the_applications_own_encodes_them(proxy: Proxy, observer: Connection) -> None:
    engine = create_async_engine(proxy.url, pool_size=1, max_overflow=0)
    prepare(engine)

    @event.listens_for(engine.sync_engine, "connect")
    def set_codec(connection: Any, _record: Any) -> None:
        async def set_it(driver: Connection) -> None:
            await driver.set_type_codec(
                "varchar", schema="pg_catalog", encoder=str.upper, decoder=str.lower, format="text"
            )

        connection.run_async(set_it)

    sessions = async_sessionmaker(engine, expire_on_commit=False)
    for number, label in enumerate(["flushed", "first", "ahead"], start=1):
        async with begun(sessions) as session:
            session.add(Parcel(id=number, label=label))
            await session.commit()
    assert await labels(observer) == ["FLUSHED", "FIRST", "AHEAD"]
    await engine.dispose()


# What fails


async def refused(session: AsyncSession, *rows: Any) -> None:
    session.add_all(rows)
    with pytest.raises(IntegrityError):
        await session.commit()


@pytest.mark.parametrize("also", [[], [Stamp]], ids=["alone", "before another"])
@pytest.mark.parametrize("how", ["same session", "another session"])
async def test_a_row_that_is_refused_is_new_again(
    either: SessionMaker, observer: Connection, how: str, also: list[type]
) -> None:
    """Else it would be taken for stored by whoever adds it once more."""
    async with begun(either) as session:
        await refused(session, Parcel(id=1, label="taken"), Parcel(id=0))
        await session.rollback()
        session.add(Parcel(id=1, label="taken"))
        await session.commit()
    await is_usable(either, observer)
    row, others = Parcel(id=2, label="taken"), [kind(id=2) for kind in also]
    async with begun(either) as session:
        await refused(session, row, *others)
        if how == "same session":
            await session.rollback()
            row.label = "free"
            session.add_all([row, *others])
            await session.commit()
    if how == "another session":
        row.label = "free"
        async with begun(either) as session:
            session.add_all([row, *others])
            await session.commit()
    assert (await labels(observer))[:2] == ["taken", "free"]
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 2") == len(also)


async def test_the_error_is_the_same_and_everything_is_rolled_back(
    sessions: SessionMaker, observer: Connection
) -> None:
    told = []
    for is_ahead in (False, True):
        await is_usable(sessions, observer)
        await observer.execute("DELETE FROM flushed_parcels WHERE id >= 900")
        async with begun(sessions) as session:
            session.add(Stamp(id=1))
            await session.flush()
            session.add(Parcel(id=0))
            with pytest.raises(IntegrityError) as caught:
                await (session.commit() if is_ahead else session.flush())
            told.append(str(caught.value))
            await session.rollback()
        assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 1") == 0
    assert told[0] == told[1]
    assert await is_usable(sessions, observer)


async def test_after_an_error_it_is_waited_for_once(sessions: SessionMaker, proxy: Proxy, observer: Connection) -> None:
    """SQLAlchemy, and asyncpg, learn of what has changed about a statement only from its own errors."""
    async with begun(sessions) as session:
        await refused(session, Parcel(id=0))
    took = []
    for number in (1, 2, 3):
        async with begun(sessions) as session:
            session.add(Parcel(id=number))
            before = proxy.round_trips
            await session.commit()
            took.append(proxy.round_trips - before)
    assert took == [2, 1, 1]


async def test_a_column_made_narrower_is_learnt_of(either: SessionMaker, observer: Connection) -> None:
    await observer.execute("ALTER TABLE flushed_parcels ALTER COLUMN label TYPE varchar(3)")
    try:
        async with begun(either) as session:
            session.add(Parcel(id=1, label="four"))
            with pytest.raises(DBAPIError, match="value too long"):
                await session.commit()
        async with begun(either) as session:
            session.add(Parcel(id=1, label="iii"))
            await session.commit()
    finally:
        await observer.execute("ALTER TABLE flushed_parcels ALTER COLUMN label TYPE varchar")
    assert await labels(observer) == ["iii"]
    assert await is_usable(either, observer)


async def test_what_cannot_be_encoded_fails_in_the_flush(either: SessionMaker, observer: Connection) -> None:
    async with begun(either) as session:
        session.add(Parcel(id=2**63))
        with pytest.raises(DBAPIError, match="out of int64 range"):
            await session.commit()
        await session.rollback()
    assert await is_usable(either, observer)


async def test_a_constraint_checked_at_the_commit_fails_there(sessions: SessionMaker, observer: Connection) -> None:
    async with begun(sessions) as session:
        await refused(session, row := Parcel(id=1, inside=12345))
    row.inside = None
    async with begun(sessions) as session:
        session.add(row)
        await session.commit()
    assert await labels(observer) == [None]


async def test_a_connection_lost_at_the_commit_is_an_error(proxy: Proxy, observer: Connection) -> None:
    async with warm(proxy.url) as sessions, begun(sessions) as session:
        session.add(row := Parcel(id=1, label="lost"))
        proxy.flows.clear()
        committing = asyncio.create_task(session.commit())
        await asyncio.wait([committing], timeout=0.1)
        proxy.cut()
        proxy.flows.set()
        with pytest.raises(DBAPIError):
            await committing
        await session.close()
        if not await labels(observer):
            async with begun(sessions) as session:
                session.add(row)
                await session.commit()
    assert await labels(observer) == ["lost"]


@pytest.mark.parametrize("how", ["cancelled", "lost"])
async def test_a_row_keeps_its_key_where_nobody_knows_whether_it_is_stored(
    proxy: Proxy, observer: Connection, how: str
) -> None:
    """With another key it might be stored twice."""
    async with warm(proxy.url) as sessions:
        async with begun(sessions) as session:
            session.add(row := Values(text="once"))
            proxy.stops_at = proxy.round_trips + 1
            committing = asyncio.create_task(session.commit())

            async def stored() -> bool:
                return bool(await observer.fetchval("SELECT count(*) FROM flushed_values WHERE text = 'once'"))

            await eventually(stored)
            if how == "cancelled":
                committing.cancel()
            else:
                proxy.cut()
            proxy.flows.set()
            with pytest.raises((asyncio.CancelledError, DBAPIError)):
                await committing
        assert row.id is not None
        async with begun(sessions) as session:
            await refused(session, row)
    assert await observer.fetchval("SELECT count(*) FROM flushed_values WHERE text = 'once'") == 1


async def test_a_key_that_the_session_cannot_take_is_refused_before_the_commit(
    either: SessionMaker, observer: Connection
) -> None:
    """Another object has it, whose row somebody else has deleted; SQLAlchemy warns of that after the flush."""
    Numbered.numbers = iter([1, 1])
    async with begun(either) as session:
        session.add(first := Numbered())
        await session.commit()
        await observer.execute("DELETE FROM flushed_numbered")
        await session.execute(text("SELECT 7"))
        session.add(Numbered())
        with pytest.raises(SAWarning, match="already had an identity"):
            await session.commit()
    assert first.id == 1
    assert await observer.fetchval("SELECT count(*) FROM flushed_numbered") == 0


async def test_a_commit_cancelled_while_its_row_waits_leaves_nothing(
    either: SessionMaker, observer: Connection
) -> None:
    row = Parcel(id=1, label="late")
    async with observer.transaction():
        await observer.execute("LOCK TABLE flushed_parcels IN SHARE MODE")
        async with begun(either) as session:
            session.add(row)
            committing = asyncio.create_task(session.commit())

            async def waits() -> bool:
                return await waiting_for_locks(observer, "INSERT INTO flushed_parcels") > 0

            await eventually(waits)
            committing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await committing
            await session.rollback()
    assert await labels(observer) == []
    async with begun(either) as session:
        session.add(row)
        await session.commit()
    assert await labels(observer) == ["late"]
    assert await is_usable(either, observer)


async def test_what_a_refused_flush_has_filled_in_is_filled_in_anew(either: SessionMaker, observer: Connection) -> None:
    """Keys that point to a row whose own key is changed meanwhile, and rows between rows."""
    await observer.execute("INSERT INTO flushed_parcels (id) VALUES (1)")
    async with begun(either) as session:
        parcel = Parcel(id=1)
        rows = [parcel, Paper(id=1, around=parcel, inks=[Ink(id=1)])]
        await refused(session, *rows)
        await session.rollback()
        parcel.id = 2
        session.add_all(rows)
        await session.commit()
    assert await observer.fetchval("SELECT around_id FROM flushed_papers WHERE id = 1") == 2
    assert await observer.fetchval("SELECT count(*) FROM flushed_papers_inks WHERE paper = 1 AND ink = 1") == 1


@pytest.mark.parametrize("given", [{}, {"code": None}])
async def test_a_default_that_was_refused_is_made_anew(
    either: SessionMaker, observer: Connection, given: dict[str, None]
) -> None:
    await observer.execute("INSERT INTO flushed_coupons VALUES (5, 1)")
    Coupon.codes = iter([1, 2])
    async with begun(either) as session:
        await refused(session, coupon := Coupon(id=1, **given))
        assert coupon.code is None
        await session.rollback()
        session.add(coupon)
        await session.commit()
    assert await observer.fetchval("SELECT code FROM flushed_coupons WHERE id = 1") == 2


async def test_a_type_made_anew_is_learnt_of_as_soon(either: SessionMaker, observer: Connection) -> None:
    failed = []
    for number in range(1, 7):
        if number == 4:
            await observer.execute("""
                ALTER TABLE flushed_letters DROP COLUMN kind; DROP TYPE flushed_kind;
                CREATE TYPE flushed_kind AS ENUM ('b', 'a'); ALTER TABLE flushed_letters ADD COLUMN kind flushed_kind
            """)
        async with begun(either) as session:
            session.add(Letter(id=number, kind="a"))
            try:
                await session.commit()
            except DBAPIError:
                failed.append(number)
    assert failed == [4]


@pytest.mark.parametrize("how", ["close", "rollback"])
async def test_after_an_error_that_a_savepoint_held_a_row_that_is_refused_is_new_again(
    either: SessionMaker, observer: Connection, how: str
) -> None:
    row = Parcel(id=0)
    async with begun(either) as session:
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                session.add(Parcel(id=-1))
        await refused(session, row)
        await getattr(session, how)()
    row.id, row.label = 1, "again"
    async with begun(either) as session:
        session.add(row)
        await session.commit()
    assert await labels(observer) == ["again"]


async def test_a_session_goes_on_after_a_refusal_only_once_it_is_rolled_back(either: SessionMaker) -> None:
    async with begun(either) as session:
        await refused(session, Parcel(id=0))
        with pytest.raises(PendingRollbackError):
            await session.execute(text("SELECT 7"))
        await session.rollback()
        await session.execute(text("SELECT 7"))


async def test_to_roll_back_late_takes_nothing_from_another_session(
    either: SessionMaker, engine: AsyncEngine, observer: Connection
) -> None:
    row = Parcel(id=0, label="one")
    async with begun(either) as session, AsyncSession(engine, expire_on_commit=False) as other:
        await refused(session, row)
        await session.rollback()
        row.id = 1
        other.add(row)
        await other.commit()
        await session.rollback()
        row.label = "two"
        await other.commit()
    assert await labels(observer) == ["two"]


# What may come in between


async def test_whoever_asks_in_the_same_flush_finds_the_row(either: SessionMaker) -> None:
    found: list[Any] = []

    def count(session: Session, *_: Any) -> None:
        found.append(session.connection().scalar(select(func.count()).where(Parcel.id == 1)))

    async with begun(either) as session, listening(session, "after_flush", count):
        session.add(Parcel(id=1))
        await session.commit()
    assert found == [1]


async def test_its_error_is_the_next_statements_if_one_comes(either: SessionMaker, observer: Connection) -> None:
    def ask(session: Session, *_: Any) -> None:
        session.connection().execute(text("SELECT 7"))

    async with begun(either) as session, listening(session, "after_flush", ask):
        await refused(session, row := Parcel(id=0))
        await session.rollback()
        row.id = 1
        session.add(row)
        await session.commit()
    assert await labels(observer) == [None]
    assert await is_usable(either, observer)


async def test_a_savepoint_contains_what_comes_in_it(either: SessionMaker, observer: Connection) -> None:
    def save(session: Session, *_: Any) -> None:
        with suppress(IntegrityError), session.connection().begin_nested():
            session.connection().execute(insert(Stamp).values(id=0))

    async with begun(either) as session, listening(session, "after_flush", save):
        session.add(Parcel(id=1, label="kept"))
        await session.commit()
    assert await labels(observer) == ["kept"]
    async with begun(either) as session:
        session.add(Parcel(id=2, label="kept too"))
        async with session.begin_nested():
            session.add(Stamp(id=2))
        await session.commit()
    assert await labels(observer) == ["kept", "kept too"]


async def test_a_savepoints_own_commit_is_not_the_last(either: SessionMaker, observer: Connection) -> None:
    async with begun(either) as session:
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                session.add(Parcel(id=0))
        session.add(Parcel(id=1, label="goes on"))
        await session.commit()
    assert await labels(observer) == ["goes on"]


async def test_a_savepoint_that_is_open_is_released_first(either: SessionMaker, observer: Connection) -> None:
    async with begun(either) as session:
        await session.begin_nested()
        session.add(Parcel(id=1, label="in it"))
        await session.commit()
    assert await labels(observer) == ["in it"]


async def test_rows_of_others_in_the_flush_are_counted_as_they_are(either: SessionMaker, observer: Connection) -> None:
    """A trigger may put a row elsewhere; the ORM does not ask, others may."""
    await observer.execute(NOTHING)
    counted: list[int] = []

    def core(session: Session, *_: Any) -> None:
        counted.append(session.connection().execute(insert(Stamp.__table__).values(id=7)).rowcount)  # type: ignore[arg-type]

    try:
        async with begun(either) as session:
            session.add_all([Stamp(id=1), Parcel(id=1, label="kept")])
            await session.commit()
        for _ in range(2):
            async with begun(either) as session, listening(session, "after_flush", core):
                session.add(Stamp(id=1))
                await session.commit()
    finally:
        await observer.execute("DROP TRIGGER nothing ON flushed_stamps; DROP FUNCTION flushed_nothing")
    assert await labels(observer) == ["kept"]
    assert counted == [0, 0]
    assert await is_usable(either, observer)


async def test_a_commit_that_does_not_come_leaves_the_next_flush_as_it_was(either: SessionMaker) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("not now")

    async with begun(either) as session:
        session.add(Parcel(id=0))
        async with listening(session, "before_flush", fail):
            with pytest.raises(ValueError, match="not now"):
                await session.commit()
        with pytest.raises(IntegrityError):
            await session.flush()


async def test_a_commit_that_was_rolled_back_does_not_either(either: SessionMaker) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("not now")

    def go_on(session: Session) -> None:
        """In one step of the event loop's task, as far as SQLAlchemy's are concerned."""
        session.add(Parcel(id=0))
        with pytest.raises(ValueError, match="not now"):
            session.commit()
        session.rollback()
        event.remove(session, "before_flush", fail)
        session.connection()
        session.add(Parcel(id=0))
        with pytest.raises(IntegrityError):
            session.flush()

    async with begun(either) as session:
        event.listen(session.sync_session, "before_flush", fail)
        await session.run_sync(go_on)


async def test_a_rule_may_make_more_rows_of_one(either: SessionMaker, observer: Connection) -> None:
    await observer.execute("""
        CREATE RULE flushed_twice AS ON INSERT TO flushed_stamps DO INSTEAD
        INSERT INTO flushed_tickets SELECT new.id * 10 + n FROM generate_series(1, 2) AS n
    """)
    try:
        for number in (1, 2, 3):
            async with begun(either) as session:
                session.add(Stamp(id=number))
                await session.commit()
    finally:
        await observer.execute("DROP RULE flushed_twice ON flushed_stamps")
    assert await observer.fetchval("SELECT count(*) FROM flushed_tickets WHERE id BETWEEN 11 AND 32") == 6


async def test_nothing_goes_on_after_the_commit(sessions: SessionMaker, observer: Connection) -> None:
    """Were SQLAlchemy, or coord itself, to execute something there, it would have no transaction."""

    def go_on(session: Session, *_: Any) -> None:
        session.connection().execute(insert(Stamp).values(id=70))

    go_on.__module__ = "coord"
    async with begun(sessions) as session, listening(session, "after_flush", go_on):
        session.add(Parcel(id=1))
        with pytest.raises(InvalidRequestError, match="committed by its last flush"):
            await session.commit()
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 70") == 0
    assert await is_usable(sessions, observer)


# Who listens


async def test_whoever_flushes_before_the_commit_is_told(either: SessionMaker, observer: Connection) -> None:
    def save(session: Session) -> None:
        if not session.in_nested_transaction():
            with suppress(IntegrityError), session.begin_nested():
                session.add(Parcel(id=0))

    def flush(session: Session) -> None:
        session.add(Parcel(id=0))
        try:
            session.flush()
        except IntegrityError:
            told.append("refused")
            raise

    told: list[str] = []
    async with begun(either) as session, listening(session, "before_commit", save):
        session.add(Parcel(id=1, label="kept"))
        await session.commit()
    async with begun(either) as session, listening(session, "before_commit", flush):
        with pytest.raises(IntegrityError):
            await session.commit()
    assert told == ["refused"]
    assert await labels(observer) == ["kept"]


@pytest.mark.parametrize("name", ["before_commit", "after_flush_postexec", "pending_to_persistent"])
async def test_who_listens_may_go_on_with_the_transaction(
    either: SessionMaker, observer: Connection, name: str
) -> None:
    def go_on(session: Session, *_: Any) -> None:
        if name == "before_commit":
            session.flush()
        session.connection().execute(insert(Stamp).values(id=60))

    async with begun(either) as session, listening(session, name, go_on):
        session.add(Parcel(id=1, label="kept"))
        await session.commit()
    assert await labels(observer) == ["kept"]
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 60") == 1


@pytest.mark.parametrize("name", ["refresh_flush", "after_update", "before_update"])
async def test_what_a_listener_adds_is_stored(either: SessionMaker, observer: Connection, name: str) -> None:
    def add(subject: Any, *more: Any) -> None:
        row = more[-1] if name.endswith("update") else subject
        session = object_session(row)
        assert session is not None
        session.add(Stamp(id=80))

    Coupon.codes = iter([1])
    target = Coupon if name == "refresh_flush" else Parcel
    event.listen(target, name, add)
    try:
        async with begun(either) as session:
            (await session.get_one(Parcel, -1)).label = "changed" if name.endswith("update") else None
            session.add(Coupon(id=1))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SAWarning)
                await session.commit()
    finally:
        event.remove(target, name, add)
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 80") == 1
    assert await observer.fetchval("SELECT count(*) FROM flushed_coupons WHERE id = 1") == 1


async def test_who_hears_of_transactions_ends_may_go_on(either: SessionMaker, observer: Connection) -> None:
    def go_on(session: Session, ended: Any) -> None:
        if ended.parent is not None:
            session.connection().execute(insert(Stamp).values(id=81))

    async with begun(either) as session, listening(session, "after_transaction_end", go_on):
        session.add(Parcel(id=1, label="kept"))
        await session.commit()
    assert await labels(observer) == ["kept"]
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 81") == 1


async def test_a_session_may_flush_in_its_own_way(either: SessionMaker, observer: Connection) -> None:
    class Following(Session):
        def flush(self, objects: Any = None) -> None:
            has_row = bool(self.new)
            super().flush(objects)
            if has_row:
                self.connection().execute(insert(Stamp).values(id=82))

    async with AsyncSession(either.kw["bind"], sync_session_class=Following) as session:
        await session.execute(text("SELECT 7"))
        session.add(Parcel(id=1, label="kept"))
        await session.commit()
    assert await labels(observer) == ["kept"]
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 82") == 1


async def test_a_flush_that_somebody_has_wrapped_may_go_on(either: SessionMaker, observer: Connection) -> None:
    async with begun(either) as session:
        flush = session.sync_session.flush

        def following(objects: Any = None) -> None:
            flush(objects)
            session.sync_session.connection().execute(insert(Stamp).values(id=83))

        session.sync_session.flush = following  # type: ignore[method-assign]
        session.add(Parcel(id=1, label="kept"))
        await session.commit()
    assert await labels(observer) == ["kept"]
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 83") == 1


async def test_anything_callable_may_listen(either: SessionMaker, observer: Connection) -> None:
    heard: list[Any] = []
    async with begun(either) as session, listening(session, "before_flush", lambda *_: heard.append(1)):
        event.listen(session.sync_session, "after_flush", {}.setdefault)
        session.add(Parcel(id=1, label="kept"))
        await session.commit()
    assert (heard, await labels(observer)) == ([1], ["kept"])


async def test_a_session_within_anothers_flush_is_told(either: SessionMaker, observer: Connection) -> None:
    outcomes: list[str] = []

    def within(_mapper: Any, connection: Any, _row: Any) -> None:
        with connection.begin_nested() as savepoint, Session(connection) as inner:
            inner.add(Stamp(id=0))
            try:
                inner.flush()
            except IntegrityError:
                savepoint.rollback()
                outcomes.append("refused")
        with Session(connection, join_transaction_mode="rollback_only") as inner:
            inner.add(Stamp(id=9))
            inner.flush()

    event.listen(Parcel, "before_insert", within)
    try:
        async with begun(either) as session:
            session.add(Parcel(id=1, label="kept"))
            await session.commit()
    finally:
        event.remove(Parcel, "before_insert", within)
    assert outcomes == ["refused"]
    assert await labels(observer) == ["kept"]
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 9") == 1


@pytest.mark.parametrize("name", ["commit", "before_cursor_execute"])
async def test_an_engine_that_is_listened_to_gives_whole_connections_back(
    either: SessionMaker, observer: Connection, name: str
) -> None:
    engine: AsyncEngine = either.kw["bind"]

    def ask(connection: Any, *rest: Any) -> None:
        if name == "commit":
            connection.exec_driver_sql("SELECT 7")

    event.listen(engine.sync_engine, name, ask)
    try:
        row = Parcel(id=0)
        async with begun(either) as session:
            await refused(session, row)
    finally:
        event.remove(engine.sync_engine, name, ask)
    row.id, row.label = 1, "again"
    async with begun(either) as session:
        session.add(row)
        await session.commit()
    assert await labels(observer) == ["again"]


@pytest.mark.parametrize("when", ["before_commit", "after_flush"])
async def test_a_second_engine_that_joins_late_commits_nothing_alone(
    either: SessionMaker, engine: AsyncEngine, observer: Connection, when: str
) -> None:
    def join(session: Session, *_: Any) -> None:
        session.execute(insert(Stamp.__table__).values(id=50), bind_arguments={"bind": engine.sync_engine})  # type: ignore[arg-type]

    for _ in range(4):
        async with begun(either) as session, listening(session, when, join):
            await refused(session, Parcel(id=0))
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 50") == 0


# Whose sessions are left alone


async def test_a_session_that_chooses_its_engine_is_not_asked(sessions: SessionMaker, observer: Connection) -> None:
    asked: list[Any] = []

    class Routing(Session):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            asked.append(mapper)
            assert mapper is not None or options.get("clause") is not None
            return super().get_bind(mapper, **options)

    routed = async_sessionmaker(sessions.kw["bind"], sync_session_class=Routing, expire_on_commit=False)
    async with routed() as session:
        await session.get(Parcel, -1)
        session.add(Parcel(id=1, label="routed"))
        await session.commit()
    assert await labels(observer) == ["routed"]
    assert asked


@pytest.mark.parametrize("how", ["binds", "get_bind"])
async def test_two_engines_both_commit_or_neither(
    either: SessionMaker, engine: AsyncEngine, observer: Connection, how: str
) -> None:
    class Routing(Session):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            is_stamp = mapper is not None and mapper.class_ is Stamp
            return engine.sync_engine if is_stamp else super().get_bind(mapper, **options)

    options: dict[str, Any] = {"binds": {Stamp: engine}} if how == "binds" else {"sync_session_class": Routing}
    async with AsyncSession(either.kw["bind"], **options) as session:
        await session.get(Parcel, -1)
        await refused(session, Parcel(id=0), Stamp(id=50))
    assert await observer.fetchval("SELECT count(*) FROM flushed_stamps WHERE id = 50") == 0


@pytest.mark.parametrize("mode", ["rollback_only", "create_savepoint"])
async def test_a_session_inside_somebodys_transaction_does_not_commit(
    either: SessionMaker, observer: Connection, mode: Any
) -> None:
    engine: AsyncEngine = either.kw["bind"]
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode=mode) as session:
            await session.execute(text("SELECT 7"))
            session.add(Parcel(id=0))
            with pytest.raises(IntegrityError, match="INSERT INTO flushed_parcels"):
                await session.commit()
        if outer.is_active:
            await outer.rollback()
    assert await is_usable(either, observer)


async def test_what_the_database_fills_in_is_read(either: SessionMaker) -> None:
    for _ in range(3):
        async with begun(either) as session:
            session.add(ticket := Ticket())
            await session.commit()
            assert ticket.id > 0


async def test_in_autocommit_each_row_is_waited_for(either: SessionMaker, observer: Connection) -> None:
    engine: AsyncEngine = either.kw["bind"].execution_options(isolation_level="AUTOCOMMIT")
    for number in (1, 2, 3):
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 7"))
            session.add(Parcel(id=number, label=str(number)))
            await session.commit()
    assert await labels(observer) == ["1", "2", "3"]


async def test_in_autocommit_a_row_stays_whatever_follows(either: SessionMaker, observer: Connection) -> None:
    engine: AsyncEngine = either.kw["bind"].execution_options(isolation_level="AUTOCOMMIT")
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 7"))
        await refused(session, Parcel(id=1, label="stays"), Stamp(id=0))
    assert await labels(observer) == ["stays"]


async def test_a_job_is_never_taken_for_stored_because_other_rows_may_vary(
    sessions: SessionMaker, observer: Connection
) -> None:
    """A trigger that makes nothing of the ledger's row ends the connection, also after rows that were refused."""
    await observer.execute(NOTHING)
    try:
        async with begun(sessions) as session:
            await refused(session, Parcel(id=0), Ink(id=50))
            await session.rollback()
            driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
            for number in (1, 2):
                await driver.execute("BEGIN;")
                await driver.insert_ahead("INSERT INTO flushed_stamps VALUES ($1)", number)
                if number == 1:
                    await driver.execute("ROLLBACK;")
            with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
                await driver.fetch("SELECT 7")
    finally:
        await observer.execute("DROP TRIGGER nothing ON flushed_stamps; DROP FUNCTION flushed_nothing")


async def test_a_connection_keeps_no_session(sessions: SessionMaker) -> None:
    for level in ("AUTOCOMMIT", "READ COMMITTED"):
        engine: AsyncEngine = sessions.kw["bind"].execution_options(isolation_level=level)
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 7"))
            session.add(Parcel(id=1000 + len(level)))
            await session.commit()
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            assert (driver.last_flush, driver.has_committed) == (None, False)


async def test_a_driver_that_keeps_no_statements_waits(proxy: Proxy, observer: Connection) -> None:
    options = {"connect_args": {"statement_cache_size": 0, "prepared_statement_cache_size": 0}}
    async with warm(proxy.url, **options) as sessions:
        assert await is_usable(sessions, observer)
        async with begun(sessions) as session:
            await refused(session, Parcel(id=0))
