"""Sessions whose commit comes before the answer, and transactions that nest."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.requests import HTTPConnection

from coord.cancellation import cleaned_up, interruptible, settled
from coord.database.engine import AnySession, engine_of, engines_of, made_by, prepare, session_of
from coord.database.transaction import connections_in_use, is_owned, own

SessionMaker = async_sessionmaker[AsyncSession]

_BARE: Any = None  # FastAPI injects a parameter annotated exactly HTTPConnection; a union with None it would refuse
_SESSIONS = "coord.sessions"


def create_db_dependency(session_maker: SessionMaker) -> Callable[..., AsyncGenerator[AsyncSession, None]]:
    """A FastAPI dependency: one session a request, committed before the first byte of the response leaves.

    It holds for `Depends(get_db)` and `Depends(get_db, scope="function")` alike and however they are mixed in one
    request. A commit that fails is an error response. Raise to roll back; what is returned, a 4xx too, is committed.
    Background tasks run after the commit. A streaming body may read through the session; what it writes is rolled
    back. No connection is taken before the first statement, and a cancelled request leaves no statement behind.

        get_db = create_db_dependency(session_maker=session_maker)

        @app.post("/users", status_code=201)
        async def create_user(session: AsyncSession = Depends(get_db)):
            session.add(User())

    Raises `ValueError` here, at once, when the maker is not bound to `postgresql+asyncpg`, and `RuntimeError` in a
    request that is not for one of FastAPI's own routes. Outside a request, `asynccontextmanager(get_db)()` and
    `async for session in get_db()` commit when they end.
    """
    context = create_db_context(session_maker)

    async def get_db(connection: HTTPConnection = _BARE) -> AsyncGenerator[AsyncSession, None]:
        if connection is not _BARE:
            yield await _request_session(connection.scope, session_maker)
            return
        async with context() as session:
            yield session

    return get_db


def create_db_context(session_maker: SessionMaker) -> Callable[[], AbstractAsyncContextManager[AsyncSession]]:
    """`async with context() as session` for tasks and scripts: commits at exit, rolls back when the body raises.

        db_context = create_db_context(session_maker=session_maker)

        async with db_context() as session:
            session.add(User())

    Like a request, the block is one transaction until it commits by itself. Raises `ValueError` here, at once, when the
    maker is not bound to `postgresql+asyncpg`.
    """
    _prepare(made_by(session_maker))

    @asynccontextmanager
    async def context() -> AsyncIterator[AsyncSession]:
        async with _opened(session_maker) as session, _committing(session):
            yield session

    return context


@asynccontextmanager
async def get_transaction(session: AnySession) -> AsyncIterator[AsyncSession]:
    """A transaction that commits at exit, or a savepoint when the session already is in one.

    A savepoint's success is provisional: the transaction around it still has to commit, also one that a plain read has
    begun. An exception rolls back to where this block began, and no further. `commit()` and `rollback()` of the
    session inside the block are refused by SQLAlchemy at the next statement.

        async with get_transaction(session=session):
            session.add(User())
            async with get_transaction(session=session):  # a savepoint
                session.add(Role())
    """
    session = session_of(session)
    block = session.begin_nested() if session.in_transaction() or is_owned(session) else session.begin()
    async with settled(block):
        yield session


async def _request_session(scope: MutableMapping[str, Any], session_maker: SessionMaker) -> AsyncSession:
    """The request's one session of this maker; its commit and its end are hung on FastAPI's own exit stacks.

    FastAPI (0.121 and later) leaves `fastapi_function_astack` after the handler and before the response, and
    `fastapi_inner_astack` after the response. The dependency's own generator would end on either, by its scope.
    """
    before, after = scope.get("fastapi_function_astack"), scope.get("fastapi_inner_astack")
    if not isinstance(before, AsyncExitStack) or not isinstance(after, AsyncExitStack):
        raise RuntimeError(  # noqa: TRY004 - the request is of the right type
            "coord cannot commit before the response: this request has no exit stack that ends before it. "
            "FastAPI >= 0.121 and its own routes are needed."
        )
    sessions: dict[Any, AsyncSession] = scope.setdefault(_SESSIONS, {})
    attempt = (session_maker, after)  # a middleware may run the application twice with one scope
    if attempt not in sessions:
        session = await after.enter_async_context(_opened(session_maker))
        sessions[attempt] = await before.enter_async_context(_committing(session))
    return sessions[attempt]


def _prepare(session: AsyncSession) -> bool:
    """Its engines, if it has any already: `configure(bind=…)` may come later, in a lifespan."""
    engines = engines_of(session)
    for engine in engines:
        prepare(engine)
    return bool(engines)


@asynccontextmanager
async def _opened(session_maker: SessionMaker) -> AsyncIterator[AsyncSession]:
    session = session_maker()
    if not _prepare(session):
        engine_of(session)  # says so
    own(session)
    try:
        yield session
    finally:
        await closed(session)


async def closed(session: AsyncSession) -> None:
    """Close it whatever cancels the caller; outside a transaction there is nothing to wait for."""
    if session.in_transaction():
        await cleaned_up(session.close())
    else:
        session.sync_session.close()


@asynccontextmanager
async def _committing(session: AsyncSession) -> AsyncIterator[AsyncSession]:
    try:
        yield session
        await interruptible(session.commit())
    except BaseException:
        if connections_in_use(session.sync_session):
            await cleaned_up(session.rollback())
        else:
            session.sync_session.rollback()
        raise
