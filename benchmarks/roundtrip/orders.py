"""What is the same for every contender: the table, the SQL of the request, and that of the job."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CONCURRENCY = 20
"""Jobs that a worker runs at once, and connections in the pool of every process."""
PENDING, DONE = "pending", "done"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    status: Mapped[str]
    effects: Mapped[int]
    """Times that the job's effect was applied: one, if all is well."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a contender plays."""

    database_url: str
    redis_url: str
    mode: str
    """In which a job locks the table."""

    @property
    def dsn(self) -> str:
        return self.database_url.replace("+asyncpg", "")


class Orders:
    """Sessions as a user of coord writes them, each its own transaction."""

    def __init__(self, scene: Scene) -> None:
        self.engine: AsyncEngine = create_async_engine(scene.database_url, pool_size=CONCURRENCY, max_overflow=0)
        self.sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(self.engine, expire_on_commit=False)
        self._lock = text(f"LOCK TABLE orders IN {scene.mode} MODE")

    async def insert(self, order_id: int) -> None:
        async with self.sessions.begin() as session:
            session.add(pending(order_id))

    async def status(self, order_id: int) -> str:
        async with self.sessions() as session:
            return (await session.get_one(Order, order_id)).status

    async def fulfil(self, order_id: int, *, announced_on: str | None = None) -> None:
        """The job. `announced_on` is a channel that is notified in the same transaction."""
        async with self.sessions.begin() as session:
            await session.execute(self._lock)
            fulfil(await session.get_one(Order, order_id))
            if announced_on is not None:
                await session.flush()
                announced = {"channel": announced_on, "order": str(order_id)}
                await session.execute(text("SELECT pg_notify(:channel, :order)"), announced)


def pending(order_id: int) -> Order:
    return Order(id=order_id, status=PENDING, effects=0)


def fulfil(order: Order) -> None:
    order.status = DONE
    order.effects += 1
