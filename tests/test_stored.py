"""What a session flushed is no change, however PostgreSQL spells it; what differs there is one."""

from __future__ import annotations

import asyncio
import enum
import math
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    ARRAY,
    CHAR,
    JSON,
    REAL,
    TIMESTAMP,
    BigInteger,
    Column,
    Date,
    DateTime,
    Double,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Table,
    Text,
    Time,
    TypeDecorator,
    Uuid,
    event,
    inspect,
    text,
)
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import DeclarativeBase, Mapped, composite, mapped_column
from sqlalchemy.types import UserDefinedType

from coord import WaitTimeoutError, wait_for_row_change
from coord.waiting.baseline import is_certain
from tests.serving import eventually
from tests.waits import registered, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("nobody_left_waiting", "values", "read_settings")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Upper(TypeDecorator[str]):
    """Another text in Python than in PostgreSQL."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value.lower()


class Own(UserDefinedType[Any]):
    """A type that the mapping only names."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name


class Parts(list[float]):
    """As an array of NumPy's: what `==` gives is an array as well, and neither true nor false."""

    def __eq__(self, other: object) -> Any:
        return Parts(map(float.__eq__, self, cast("Parts", other)))

    def __bool__(self) -> bool:
        raise ValueError("The truth value of an array with more than one element is ambiguous")


class Embedding(TypeDecorator[Any]):
    """An array in Python."""

    impl = ARRAY(REAL)
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else Parts(value)


class Base(DeclarativeBase):
    pass


NAIVE = datetime(2026, 1, 2, 3, 4, 5, 678901)
AWARE = NAIVE.replace(tzinfo=timezone(timedelta(hours=5, minutes=30)))
KINDS: list[tuple[str, Any, str, Any, str]] = [
    ("inet", pg.INET(), "inet", "10.0.0.1", "'10.0.0.2'"),
    ("inet6", pg.INET(), "inet", "2001:DB8:0:0::1", "'::1'"),
    ("cidr", pg.CIDR(), "cidr", "10.1.0.0/16", "'10.2.0.0/16'"),
    ("macaddr", pg.MACADDR(), "macaddr", "08-00-2B-01-02-03", "'08:00:2b:01:02:04'"),
    ("timestamp0", DateTime(), "timestamp(0)", NAIVE, "'2026-01-02 03:04:05'"),
    ("timestamp3", pg.TIMESTAMP(precision=3), "timestamp(3)", NAIVE, "'2026-01-02 03:04:05.678'"),
    ("timestamptz", TIMESTAMP(timezone=True), "timestamptz", AWARE, "now()"),
    ("naive", DateTime(), "timestamptz", NAIVE, "now()"),
    ("naive0", DateTime(), "timestamptz(0)", NAIVE, "now()"),
    ("time3", Time(), "time(3)", time(3, 4, 5, 678901), "'03:04:05.678'"),
    ("real", REAL(), "real", 0.1, "0.2"),
    ("reals", ARRAY(REAL()), "real[]", [0.1, 0.2], "'{0.1,0.3}'"),
    ("nan", Float(), "float8", math.nan, "1"),
    ("nans", ARRAY(Float()), "float8[]", [math.nan], "'{1}'"),
    ("double", Double(asdecimal=True), "float8", Decimal("0.1"), "0.2"),
    ("numeric", Numeric(), "numeric", 9.9, "9.91"),
    ("numeric2", Numeric(10, 2), "numeric(10,2)", Decimal("9.987"), "9.98"),
    ("unscaled", Numeric(), "numeric(10,2)", 1, "1.01"),
    ("numerics", ARRAY(Numeric()), "numeric(10,2)[]", [9.9, 1], "'{9.9,1.01}'"),
    ("char", CHAR(5), "char(5)", "ab", "'abc'"),
    ("lying", String(), "char(5)", "ab", "'abc'"),
    ("varchar", String(), "varchar(3)", "abc   ", "'abd'"),
    ("citext", Text(), "text", "Ab", "'ab'"),
    ("interval", Interval(), "interval", timedelta(days=1, hours=25), "'3 days'"),
    ("interval0", Interval(second_precision=0), "interval(0)", timedelta(seconds=1.4), "'2 s'"),
    ("json", JSON(), "json", {1: (2, 3), "b": 1.50}, """'{"1": [2, 4]}'"""),
    ("jsonb", pg.JSONB(), "jsonb", {"b": (1,), "a": None, 2: 1e2}, """'{"a": null}'"""),
    ("hstore", pg.HSTORE(), "hstore", {"b": "1", "a": None}, "'a=>1'"),
    ("int4range", pg.INT4RANGE(), "int4range", pg.Range(1, 5, bounds="[]"), "'[1,7)'"),
    ("tstzrange", pg.TSTZRANGE(), "tstzrange", pg.Range(AWARE, None), "'[2026-01-01,)'"),
    ("multirange", pg.INT4MULTIRANGE(), "int4multirange", [pg.Range(4, 6), pg.Range(1, 4)], "'{[1,7)}'"),
    ("domain", Numeric(), "money_amount", 9.9, "9.91"),
    ("enum", Enum(Colour, name="colour_kind"), "colour_kind", Colour.RED, "'BLUE'"),
    ("word", Enum(Colour, native_enum=False), "text", Colour.RED, "'BLUE'"),
    ("bytea", LargeBinary(), "bytea", bytearray(b"\0x"), "'\\x01'"),
    ("uuid", Uuid(as_uuid=False), "uuid", "6F1F5A0C-0000-4000-8000-000000000001", "gen_random_uuid()"),
    ("bit", pg.BIT(4), "bit(4)", "0101", "B'0111'"),
    ("varbit", pg.BIT(varying=True), "varbit", "01", "B'010'"),
    ("ints", ARRAY(Integer()), "int[]", (1, 2), "'{2,1}'"),
    ("tsvector", pg.TSVECTOR(), "tsvector", "b a", "'a'"),
    ("date", Date(), "date", date(2026, 1, 2), "'2026-01-03'"),
    ("upper", Upper(), "text", "ABC", "'abd'"),
    ("point", Own("point"), "point", (1.10, 2), "'(1,3)'"),
    ("box", Own("box"), "box", ((0, 0), (1, 1)), "'(2,2),(1,1)'"),
    ("path", Own("path"), "path", ((0, 0), (1, 1)), "'((0,0),(1,2))'"),
    ("embedding", Embedding(), "real[]", Parts([0.1, 0.2]), "'{0.1,0.3}'"),
    ("int", Integer(), "numeric(5,2)", 5, "5.5"),
    ("big", BigInteger(), "bigint", True, "2"),
]
TABLE = Table(
    "stored_values",
    Base.metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    *(Column(f"the {name}", kind, key=name) for name, kind, *_ in KINDS),
)


@dataclass
class Place:
    x: Decimal
    y: Decimal


class Values(Base):
    __table__ = TABLE


class Placed(Base):
    __tablename__ = "stored_places"
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[Decimal] = mapped_column(Numeric())
    y: Mapped[Decimal] = mapped_column(Numeric())
    place: Mapped[Place] = composite(Place, "x", "y")


@pytest.fixture(scope="module")
async def kinds(engine: AsyncEngine) -> AsyncIterator[None]:
    """The columns are of PostgreSQL's types, whatever the mapping calls them."""
    columns = ", ".join(f'"the {name}" {kind}' for name, _, kind, *_ in KINDS)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS hstore")
        await connection.exec_driver_sql("CREATE TYPE colour_kind AS ENUM ('RED', 'BLUE')")
        await connection.exec_driver_sql("CREATE DOMAIN money_amount AS numeric(10,2)")
        await connection.exec_driver_sql(f"CREATE TABLE stored_values (id int PRIMARY KEY, {columns})")
        await connection.exec_driver_sql("CREATE TABLE stored_places (id int PRIMARY KEY, x numeric(9,1), y real)")
    await engine.dispose()  # or those that are connected know no hstore
    yield
    async with engine.begin() as connection:
        await connection.exec_driver_sql("DROP TABLE stored_values, stored_places")
        await connection.exec_driver_sql("DROP TYPE colour_kind")
        await connection.exec_driver_sql("DROP DOMAIN money_amount")


@pytest.fixture
async def values(kinds: None, engine: AsyncEngine) -> AsyncIterator[None]:
    yield
    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM stored_values"))
        await connection.execute(text("DELETE FROM stored_places"))


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [(name, value, other) for name, _, _, value, other in KINDS],
    ids=[kind[0] for kind in KINDS],
)
async def test_what_was_flushed_is_no_change_and_another_value_is_one(
    session_maker: SessionMaker, observer: Connection, name: str, value: Any, other: str
) -> None:
    async with session_maker() as session:
        own = Values(id=1, **{name: value})
        session.add(own)
        await session.commit()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, Values, 1, interval=0.02, timeout=0.06)
        await observer.execute(f'UPDATE stored_values SET "the {name}" = {other}')
        assert await wait_for_row_change(session, Values, 1, interval=0.02, timeout=5) is own
        await session.commit()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, Values, 1, interval=0.02, timeout=0.06)


_FLOATS = st.floats(-1e6, 1e6).map(lambda each: round(each, 9))
"""None that REAL refuses as too small."""


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    flushed=st.fixed_dictionaries(
        {},
        optional={
            "real": _FLOATS,
            "reals": st.lists(_FLOATS, max_size=3),
            "numeric2": _FLOATS | st.integers(-1000, 1000),
            "numerics": st.lists(_FLOATS, max_size=3),
            "timestamp0": st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),
            "naive": st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),
            "inet": st.ip_addresses().map(str),
            "char": st.text("ab ", max_size=5),
            "json": st.recursive(
                st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text('ab\\"é'),
                lambda inner: st.lists(inner).map(tuple) | st.dictionaries(st.integers() | st.text("ab"), inner),
                max_leaves=5,
            ),
            "jsonb": st.dictionaries(st.integers() | st.text("ab"), st.floats(allow_nan=False, allow_infinity=False)),
            "interval": st.timedeltas(timedelta(-9999), timedelta(9999)),
            "uuid": st.uuids().map(lambda each: each.hex.upper()),
        },
    )
)
async def test_no_value_that_was_flushed_is_a_change(session_maker: SessionMaker, flushed: dict[str, Any]) -> None:
    async with session_maker() as session:
        await session.execute(text("DELETE FROM stored_values"))
        own = Values(id=1, **flushed)
        session.add(own)
        await session.commit()
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(session, type(own), 1, interval=0.02, timeout=0.03)


async def test_a_composite_is_no_change_and_is_current(session_maker: SessionMaker, observer: Connection) -> None:
    async with session_maker() as session:
        own = Placed(id=1, place=Place(Decimal("1.26"), Decimal("0.1")))
        session.add(own)
        await session.commit()
        task = waiting(session, Placed, 1)
        await registered()
        assert not (await asyncio.wait([task], timeout=0.15))[0]
        await observer.execute("UPDATE stored_places SET x = 7")
        assert await task is own
        assert own.place.x == Decimal("7.0")


async def test_a_connection_that_is_lost_while_postgresql_compares_ends_no_wait(
    session_maker: SessionMaker, engine: AsyncEngine, observer: Connection
) -> None:
    lost: list[str] = []

    def lose(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "json_populate_record" in statement and not lost:
            lost.append(statement)
            connection.connection.driver_connection.terminate()

    event.listen(engine.sync_engine, "before_cursor_execute", lose)
    try:
        async with session_maker() as session:
            own = Values(id=1, numeric2=Decimal("9.987"))
            session.add(own)
            await session.commit()
            task = waiting(session, Values, 1)
            await eventually(lambda: lost)
            await registered()
            await observer.execute('UPDATE stored_values SET "the numeric2" = 9.98')
            assert await task is own
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", lose)


@pytest.mark.parametrize(
    ("kind", "seen", "read"),
    [
        (Integer(), 1, 2),
        (String(), "a", "b"),
        (Enum(Colour), Colour.RED, Colour.BLUE),
        (Date(), date(2026, 1, 1), date(2026, 1, 2)),
        (Uuid(), uuid.UUID(int=1), uuid.UUID(int=2)),
        (Numeric(), None, Decimal(1)),
    ],
)
def test_postgresql_is_not_asked_what_python_knows(kind: Any, seen: Any, read: Any) -> None:
    """It costs a round trip, which most changes go without."""
    assert is_certain(kind, seen, read)


def test_every_column_is_mapped() -> None:
    assert {"id", *(kind[0] for kind in KINDS)} == {each.key for each in inspect(Values).column_attrs}
    assert AWARE.astimezone(UTC) == AWARE
