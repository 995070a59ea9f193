"""fastapi-users on SQLAlchemy 2.0: who registers is verified by a worker before the answer.

Its adapter for SQLAlchemy has an upper bound below 2.1; from 7.0 on it maps its columns as 2.0 does.
"""

from __future__ import annotations

import uuid
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

if int(version("fastapi-users-db-sqlalchemy").split(".")[0]) < 7:
    pytest.skip("the adapter for SQLAlchemy 2.0 cannot be installed beside this SQLAlchemy", allow_module_level=True)

from fastapi import Depends, FastAPI
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport, JWTStrategy
from fastapi_users.db import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from coord import Coordinator, create_db_dependency, create_ledger, enqueue, job_transaction, wait_for_row_change
from tests.pooler import UNTOLD
from tests.round_trip import running
from tests.shop import empty_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Base(DeclarativeBase):
    pass


class Account(SQLAlchemyBaseUserTableUUID, Base):
    pass


SECRET = "a secret of the test's, long enough"


async def verify(ctx: dict[str, Any], account_id: str) -> None:
    async with job_transaction(ctx) as session:
        (await session.get_one(Account, uuid.UUID(account_id))).is_verified = True


class Accounts(UUIDIDMixin, BaseUserManager[Account, uuid.UUID]):
    reset_password_token_secret = verification_token_secret = SECRET

    async def on_after_register(self, user: Account, request: Any = None) -> None:
        session = self.user_db.session  # type: ignore[attr-defined]
        job = await enqueue(session, verify, str(user.id))
        await session.commit()
        await wait_for_row_change(session, Account, user.id, columns=[Account.is_verified], timeout=10, job=job)


async def test_who_registers_is_verified_before_the_answer_and_can_log_in(database_url: str, redis_url: str) -> None:
    async with empty_database(database_url) as url:
        engine = create_async_engine(url, pool_size=15, **UNTOLD)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await create_ledger(connection)
        maker = async_sessionmaker(engine, expire_on_commit=False)
        get_db = create_db_dependency(maker)

        async def accounts(session: AsyncSession = Depends(get_db)) -> AsyncIterator[Accounts]:
            yield Accounts(SQLAlchemyUserDatabase(session, Account))

        strategy: Any = lambda: JWTStrategy(secret=SECRET, lifetime_seconds=60)
        backend: Any = AuthenticationBackend("jwt", BearerTransport("auth/login"), strategy)
        users = FastAPIUsers[Account, uuid.UUID](accounts, [backend])
        app = FastAPI(lifespan=Coordinator(maker, redis=redis_url).lifespan)
        register = users.get_register_router(schemas.BaseUser[uuid.UUID], schemas.BaseUserCreate)
        for router in (register, users.get_auth_router(backend, requires_verification=True)):
            app.include_router(router, prefix="/auth")

        async with running(app, [verify], maker, redis_url, url) as http:
            known = {"email": "tea@example.com", "password": "a password"}
            registered = await http.post("/auth/register", json=known)
            assert (registered.status_code, registered.json()["is_verified"]) == (201, True)
            login = await http.post("/auth/login", data={"username": known["email"], "password": known["password"]})
            assert login.status_code == 200
            again = await http.post("/auth/register", json=known)
            assert again.status_code == 400
        await engine.dispose()
