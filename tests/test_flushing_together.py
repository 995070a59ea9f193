"""A row that travels with its commit, beside whatever else there is: nobody may be able to tell."""

# ruff: noqa: F811 - fixtures are imported
from __future__ import annotations

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import (
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError, InvalidRequestError, SAWarning
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, object_session

from tests.flushing import (  # noqa: F401
    NOTHING,
    Coupon,
    Ink,
    Parcel,
    Stamp,
    Ticket,
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

if TYPE_CHECKING:
    from asyncpg import Connection

    from tests.flushing import SessionMaker
    from tests.proxy import Proxy


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
