"""Rows that the driver alone reads are those that the ORM would have loaded, and what is not plain is the ORM's."""

from __future__ import annotations

import enum
import uuid
from contextlib import suppress
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    ARRAY,
    JSON,
    REAL,
    Double,
    Engine,
    Enum,
    ForeignKey,
    Interval,
    Numeric,
    String,
    TypeDecorator,
    cast,
    event,
    func,
    inspect,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    composite,
    mapped_column,
    reconstructor,
    relationship,
)
from sqlalchemy.orm.exc import DetachedInstanceError

from coord import wait_for_row_change
from coord.jobs.ledger import Job
from coord.waiting.plain import is_plain
from coord.waiting.reading import Reader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]


class Colour(enum.Enum):
    RED = "red"


class Upper(TypeDecorator[str]):
    """Another text in Python than in PostgreSQL."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value.lower()

    def process_result_value(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else str(value).upper()


class Cut(Upper):
    """And yet another when it is read, of another type."""

    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return cast(column, String(2))


class Base(DeclarativeBase):
    pass


class Thing(Base):
    """Plain, though of every kind of column."""

    __tablename__ = "quick_things"
    name: Mapped[str] = mapped_column("key name", Upper, primary_key=True)
    number: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    colour: Mapped[Colour]
    word: Mapped[Colour] = mapped_column(Enum(Colour, native_enum=False))
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    rough: Mapped[float] = mapped_column(Numeric(10, 2, asdecimal=False))
    precise: Mapped[Decimal] = mapped_column(Double(asdecimal=True))
    short: Mapped[float] = mapped_column(REAL)
    at: Mapped[datetime]
    day: Mapped[date]
    span: Mapped[timedelta] = mapped_column(Interval)
    data: Mapped[Any] = mapped_column(JSON)
    more: Mapped[Any] = mapped_column(JSONB, nullable=True)
    words: Mapped[list[str]] = mapped_column(ARRAY(Upper))
    raw: Mapped[bytes]
    cut: Mapped[str] = mapped_column(Cut)
    rest: Mapped[str | None] = mapped_column(String, deferred=True)
    parent: Mapped[int | None] = mapped_column(ForeignKey("quick_parents.id"))
    owner: Mapped[Parent | None] = relationship(lazy="joined")


class Parent(Base):
    __tablename__ = "quick_parents"
    id: Mapped[int] = mapped_column(primary_key=True)


class Expression(Base):
    __tablename__ = "quick_expressions"
    id: Mapped[int] = mapped_column(primary_key=True)


Expression.next = column_property(Expression.__table__.c.id + 1)


class Animal(Base):
    __tablename__ = "quick_animals"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012


class Cat(Animal):
    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012


class Noted(Base):
    __tablename__ = "quick_noted"
    id: Mapped[int] = mapped_column(primary_key=True)

    @reconstructor
    def note(self) -> None:
        self.noted = True


class Mutable(Base):
    __tablename__ = "quick_mutable"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(JSON))


class Rough(Base):
    """Numbers that are others in Python."""

    __tablename__ = "quick_rough"
    id: Mapped[float] = mapped_column(REAL, primary_key=True)


class Short(Base):
    """Texts that are cut when they are cast."""

    __tablename__ = "quick_short"
    id: Mapped[str] = mapped_column(String(3), primary_key=True)


class Lowered(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.lower(bindvalue)


class Bound(Base):
    """Texts that PostgreSQL makes others of."""

    __tablename__ = "quick_bound"
    id: Mapped[str] = mapped_column(Lowered, primary_key=True)


class Pair:
    def __init__(self, a: int, b: int) -> None:
        self.a, self.b = a, b


class Composed(Base):
    __tablename__ = "quick_composed"
    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int]
    b: Mapped[int]
    pair: Mapped[Pair] = composite("a", "b")


THING = {
    "name": "ADA",
    "number": uuid.UUID(int=7),
    "colour": Colour.RED,
    "word": Colour.RED,
    "price": Decimal("9.90"),
    "rough": 9.9,
    "precise": Decimal("0.1"),
    "short": 0.5,
    "at": datetime(2026, 1, 2, 3, 4, 5, 6),
    "day": date(2026, 1, 2),
    "span": timedelta(days=1, microseconds=1),
    "data": {"a": [1, None]},
    "more": None,
    "words": ["AB", "C"],
    "raw": b"\0x",
    "cut": "LONG",
    "rest": "late",
    "parent": None,
}


@pytest.fixture
async def things(engine: AsyncEngine) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


async def by_the_orm(reader: Reader, keys: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr("coord.waiting.reading.is_plain", lambda *_: False)
        return await reader.entities(keys)


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize("at_once", [1, 3])
async def test_a_row_is_as_the_orm_would_have_loaded_it(
    engine: AsyncEngine, session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    async with session_maker.begin() as session:
        session.add(Thing(**THING))
        session.add(Thing(**THING | {"name": "BOB", "number": uuid.UUID(int=8), "rest": None}))
    mapper = inspect(Thing)
    assert is_plain(mapper, engine.sync_engine)
    reader = Reader(engine, mapper, ())
    keys = [("ADA", uuid.UUID(int=7)), ("NOBODY", uuid.UUID(int=7)), ("BOB", uuid.UUID(int=8))]
    slow, quick = await by_the_orm(reader, keys, monkeypatch), dict[Any, Any]()
    for start in range(0, len(keys), at_once):
        quick |= await reader.entities(keys[start : start + at_once])
    assert list(quick) == list(slow) == [keys[0], keys[2]]
    for key in quick:
        mine, theirs = inspect(quick[key]), inspect(slow[key])
        assert mine.dict.keys() - {"_sa_instance_state"} == theirs.dict.keys() - {"_sa_instance_state"}
        assert mine.dict["cut"] == "lo"
        for name in THING:
            assert mine.dict[name] == theirs.dict[name]
            assert type(mine.dict[name]) is type(theirs.dict[name])
        assert (mine.key, mine.detached, mine.modified) == (theirs.key, True, False)
        for row in (quick[key], slow[key]):
            with pytest.raises(DetachedInstanceError):
                _ = row.owner


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize(("model", "key", "other"), [(Rough, 0.1, 0.5), (Short, "abcd", "xyz"), (Bound, "ABC", "DEF")])
async def test_a_key_is_the_same_alone_and_among_others(
    engine: AsyncEngine, session_maker: SessionMaker, model: type[Any], key: Any, other: Any
) -> None:
    async with session_maker.begin() as session:
        session.add(model(id=key[:3] if isinstance(key, str) else key))
    reader = Reader(engine, inspect(model), ())
    assert (await reader.entities([(key,)])).keys() == (await reader.entities([(key,), (other,)])).keys()


@pytest.mark.usefixtures("things")
async def test_columns_are_as_the_orm_would_have_them(
    engine: AsyncEngine, session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session_maker.begin() as session:
        session.add(Thing(**THING))
    reader, keys, names = Reader(engine, inspect(Thing), ()), [("ADA", uuid.UUID(int=7))], ("data", "colour", "words")
    quick = await reader.columns(keys, names)
    assert quick == await reader.columns([*keys, ("BOB", uuid.UUID(int=8))], names)
    monkeypatch.setattr("coord.waiting.reading.is_plain", lambda *_: False)
    assert [*quick[keys[0]]] == [*(await reader.columns(keys, names))[keys[0]]] == [1, *(THING[name] for name in names)]


@pytest.mark.usefixtures("things")
async def test_the_sessions_own_instance_is_brought_up_to_date_by_it(session_maker: SessionMaker) -> None:
    async with session_maker() as session, session_maker() as other:
        session.add(thing := Thing(**THING))
        await session.commit()
        changed = await other.get_one(Thing, ("ADA", uuid.UUID(int=7)))
        changed.data, changed.price = {"b": 1}, Decimal(10)
        await other.commit()
        assert await wait_for_row_change(session, Thing, ("ADA", uuid.UUID(int=7)), timeout=1) is thing
        assert (thing.data, thing.price, thing.rest) == ({"b": 1}, Decimal("10.00"), "late")
        assert not session.dirty
        session.expunge(thing)
        fresh = await wait_for_row_change(session, Thing, ("ADA", uuid.UUID(int=7)), until=lambda _: True, timeout=1)
        assert fresh in session
        assert await session.run_sync(lambda _: fresh.owner) is None


def test_a_job_is_plain(engine: AsyncEngine) -> None:
    assert is_plain(inspect(Job), engine.sync_engine)


@pytest.mark.parametrize("model", [Expression, Animal, Cat, Noted, Mutable, Composed])
def test_what_is_more_than_its_columns_is_the_orms(engine: AsyncEngine, model: type[Any]) -> None:
    assert not is_plain(inspect(model), engine.sync_engine)


HOOKS = [
    (Thing, "load"),
    (Session, "do_orm_execute"),
    (Session, "after_begin"),
    (None, "begin"),
    (None, "engine_connect"),
    (None, "before_execute"),
    (None, "before_cursor_execute"),
    (None, "do_execute"),
    (Engine, "before_cursor_execute"),
]


@pytest.mark.parametrize(("target", "name"), HOOKS)
def test_what_somebody_listens_to_is_the_orms(database_url: str, target: Any, name: str) -> None:
    """He may set a schema or a role, rewrite the statement, or want to see it."""

    def listen(*_: Any) -> None: ...

    engine = create_async_engine(database_url).sync_engine
    assert is_plain(inspect(Thing), engine)
    event.listen(target or engine, name, listen)
    assert not is_plain(inspect(Thing), engine)
    event.remove(target or engine, name, listen)
    assert is_plain(inspect(Thing), engine)


@pytest.mark.usefixtures("things")
async def test_a_column_of_another_type_is_read_as_that(
    database_url: str, session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker.begin() as session:
        session.add(Thing(**THING))
    engine, key = create_async_engine(database_url), ("ADA", uuid.UUID(int=7))
    reader = Reader(engine, inspect(Thing), ())
    assert (await reader.entities([key]))[key].price == Decimal("9.90")
    await observer.execute("ALTER TABLE quick_things ALTER price TYPE float8")
    with suppress(DBAPIError):  # which a wait takes for passing
        await reader.entities([key])
    price = (await reader.entities([key]))[key].price
    assert (price, type(price)) == (Decimal("9.9"), Decimal)
    await engine.dispose()


@pytest.mark.usefixtures("things")
async def test_an_error_is_said_by_the_orm_and_costs_no_connection(database_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    reader = Reader(engine, inspect(Thing), ())
    for _ in range(3):
        with pytest.raises(DBAPIError):
            await reader.entities([("ADA", "no uuid")])
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE quick_things RENAME COLUMN rest TO remainder"))
    with pytest.raises(DBAPIError, match="rest"):
        await reader.entities([("ADA", uuid.UUID(int=7))])
    assert await reader.columns([("ADA", uuid.UUID(int=7))], ("data",)) == {}
    await engine.dispose()
