"""A row that travels with its commit: what that saves, and what is left of it when it is refused."""

# ruff: noqa: F811 - fixtures are imported
from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    event,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SAWarning
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from coord import Coordinator, enqueue
from coord.postgresql.engine import prepare
from tests.flushing import (  # noqa: F401
    Coupon,
    Ink,
    Letter,
    Numbered,
    Paper,
    Parcel,
    Stamp,
    Values,
    begun,
    either,
    is_usable,
    labels,
    listening,
    made,
    proxy,
    refused,
    sessions,
    warm,
)
from tests.ledger import a_task, ledger  # noqa: F401
from tests.serving import eventually
from tests.shop import waiting_for_locks

if TYPE_CHECKING:
    from asyncpg import Connection

    from tests.flushing import SessionMaker
    from tests.proxy import Proxy


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
    ledger: None,
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
