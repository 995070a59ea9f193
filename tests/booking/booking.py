"""Guests and their seats: a small application of a user's, with tasks and API in one module, for docs/proof.md."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from coord import (
    Coordinator,
    create_db_dependency,
    create_ledger,
    enqueue,
    job_transaction,
    lock_tables,
    task_options,
    worker_settings,
)
from coord.http import Reply, reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REDIS_URL = os.environ["COORD_REDIS_URL"]
engine = create_async_engine(os.environ["COORD_DATABASE_URL"], pool_size=12)
session_maker = async_sessionmaker(engine, expire_on_commit=False)
get_db = create_db_dependency(session_maker=session_maker)


class Base(DeclarativeBase):
    """What is stored."""


class Booking(Base):
    """In version 2 from when the guest has a seat; seats run from 1 without a gap."""

    __tablename__ = "bookings"
    guest: Mapped[str] = mapped_column(primary_key=True)
    seat: Mapped[int | None] = mapped_column(unique=True)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - SQLAlchemy's own way to write it


async def assign_seat(ctx: dict[str, Any], guest: str) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [Booking]):
        booking = await session.get_one(Booking, guest)
        if booking.seat is None:
            last = await session.scalar(select(func.max(Booking.seat)))
            booking.seat = (last or 0) + 1


async def create_tables(_ctx: object) -> None:
    async with engine.begin() as connection:
        await create_ledger(connection)  # under a lock, so that API and workers may start at once
        await connection.run_sync(Base.metadata.create_all)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await create_tables(None)
    async with Coordinator(session_maker, redis=REDIS_URL, read_settings={}):
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.put("/bookings/{guest}", response_model=None)
async def book(
    guest: str, session: Annotated[AsyncSession, Depends(get_db)], reply: Annotated[Reply, Depends(reply)]
) -> Any:
    """However often it is asked for: one booking, and one seat."""
    booking = await session.get(Booking, guest)
    if booking is None:
        booking = Booking(guest=guest, seat=None)
        session.add(booking)
        await session.flush()
    if booking.seat is None:
        job = await enqueue(session, task_options(assign_seat, unique_key=guest), guest)
        await session.commit()
        seated = await reply.row(session, Booking, guest, columns=[Booking.seat], job=job)
        if seated is None:
            return await reply.accepted(session, job, location=f"/bookings/{guest}")
        booking = seated
    return {"guest": booking.guest, "seat": booking.seat, "version": booking.version}


Settings = worker_settings([assign_seat], session_maker=session_maker, redis=REDIS_URL, on_startup=create_tables)
