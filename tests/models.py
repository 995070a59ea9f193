"""The tables that the library's own tests play on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import ForeignKey, Table
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, composite, mapped_column, relationship

if TYPE_CHECKING:
    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import AsyncEngine


@dataclass
class Point:
    x: int
    y: int


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")


class Item(Base):
    """Its foreign key is checked at COMMIT, so a commit can be made to fail."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", deferrable=True, initially="DEFERRED"))
    number: Mapped[int] = mapped_column(default=0)


class Account(Base):
    """A row with a version, a renamed attribute and a key of two columns."""

    __tablename__ = "accounts"
    region: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column("status", default="open")
    balance: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - SQLAlchemy's own way to write it


class Reserved(Base):
    """A table whose name and schema have to be quoted."""

    __tablename__ = "order"
    __table_args__ = {"schema": "Other Shop"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(default="pending")


async def empty(engine: AsyncEngine, metadata: MetaData) -> None:
    """All of these tables, in one transaction; within five seconds, or somebody has left a lock behind.

    A TRUNCATE takes ten times as long, since it makes new files.
    """
    quoted = engine.dialect.identifier_preparer.format_table
    names = [quoted(table) for table in reversed(metadata.sorted_tables) if table.name != "coord_schema"]
    deletes = "; ".join(f"DELETE FROM {name}" for name in names)
    async with engine.connect() as connection:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.execute(f"SET LOCAL lock_timeout = '5s'; LOCK TABLE {', '.join(names)}; {deletes}")


def table_of(model: type[Base]) -> Table:
    table = model.__table__
    assert isinstance(table, Table)
    return table


class Document(Base):
    """What is changed in place, made of parts, found by other rows, or no number."""

    __tablename__ = "documents"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    body: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(JSONB()), default=dict)
    x: Mapped[int] = mapped_column(default=0)
    y: Mapped[int] = mapped_column(default=0)
    weight: Mapped[float] = mapped_column(default=0.0)
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    owner: Mapped[User | None] = relationship(lazy="selectin")
    place: Mapped[Point] = composite(Point, "x", "y")
