"""`Idempotency-Key`: a request that is sent again joins the job of the first, and gets its answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from inspect import iscoroutinefunction
from typing import Annotated, Any, overload
from weakref import WeakValueDictionary

from fastapi import Header, Request
from sqlalchemy import CursorResult, Executable, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.exceptions import HTTPException

from coord.cancellation import interruptible, settled
from coord.database.engine import AnySession, bind_for_writes, session_of
from coord.database.transaction import end_transaction, has_written, holds_lock, is_explicit
from coord.durations import Seconds
from coord.http.problem import EXPIRED_JOB, MALFORMED_KEY, MISSING_KEY, REUSED_KEY, UNSCOPED_KEY, Kind
from coord.jobs.enqueue import enqueue
from coord.jobs.model import Job, execute, job_mapper, jobs, keys
from coord.jobs.options import P, Task, TaskOptions, span

EXPIRY_SECONDS = 86_400
MAX_KEY_LENGTH = 255
"""Characters, as it is sent."""
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 0.5
"""Between two attempts to take a key that another request's transaction holds."""
_STRING = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])+)"')
_BARE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z:/=-]+")
IDEMPOTENCY_KEY = Header(
    alias="Idempotency-Key",
    description="One quoted string of 1 to 255 characters, of the client's making: once for each thing to be done.",
    json_schema_extra={"pattern": rf"^({_STRING.pattern}|{_BARE.pattern})$", "maxLength": MAX_KEY_LENGTH},
)


class IdempotencyError(HTTPException):
    """The key cannot be used: 400 if it is malformed or has no caller, 422 if another request has it."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind.status, kind.detail)
        self.kind = kind.name


class Idempotency:
    """One request's key, if it has one: whose it is, and what it was used for."""

    def __init__(self, key: str | None, scope: str, fingerprint: str, expires: timedelta) -> None:
        self.key = key
        self._fingerprint = fingerprint
        self._expires = expires
        self._row = {"scope": scope, "key": key, "fingerprint": fingerprint}
        self._is_mine = (keys.c.scope == scope) & (keys.c.key == key)
        self._number = int.from_bytes(bytes.fromhex(_digest(scope, key or ""))[:8], signed=True)
        """Of the advisory lock of the transaction that makes the key's job."""

    async def check(self, session: AnySession) -> None:
        """For a request that is answered without a job: raises what `enqueue` would, and keeps nothing."""
        if self.key is not None:
            await self._known(session_of(session))

    @overload
    async def enqueue(self, session: AnySession, task: str, *args: Any, **kwargs: Any) -> Job: ...
    @overload
    async def enqueue(
        self, session: AnySession, task: Task[P] | TaskOptions[P], *args: P.args, **kwargs: P.kwargs
    ) -> Job: ...
    async def enqueue(self, session: AnySession, task: Any, *args: Any, **kwargs: Any) -> Job:
        """As `coord.enqueue`, or with a key that was used before, that request's job (`job.joined`).

        The key is unique with the job, in a savepoint of the caller's transaction; nothing pending is flushed. A
        request that comes while the first is not yet committed waits for that, and holds no connection meanwhile if its
        own transaction has only read, which is ended. Where `coord.enqueue` raises, the key was not used. Raises
        `IdempotencyError`, 422, when the key belongs to a request with another path, query or body.
        """
        session = session_of(session)
        if self.key is None:
            return await enqueue(session, task, *args, **kwargs)
        mutex = _mutexes.setdefault((asyncio.get_running_loop(), self._number), asyncio.Lock())
        queues = not mutex.locked() or await interruptible(_released(session))
        async with mutex if queues else nullcontext():
            pause = MIN_POLL_SECONDS
            while (known := await self._known(session)) is None:  # read first: a request that joins writes nothing
                if (job := await self._first(session, lambda: enqueue(session, task, *args, **kwargs))) is not None:
                    return job
                await self._wait(session, pause)
                pause = min(2 * pause, MAX_POLL_SECONDS)
            return known

    async def _first(self, session: AsyncSession, enqueued: Callable[[], Awaitable[Job]]) -> Job | None:
        """The job, with the key, in a savepoint: or a 4xx for what enqueue raises would commit a key alone."""
        connection = await session.connection(bind_arguments=dict(bind_for_writes(job_mapper)))
        async with settled(connection.begin_nested()):
            if not await self._taken(session):
                return None
            job = await enqueued()
            await _run(session, update(keys).where(self._is_mine).values(job_id=job.id))
            return job

    async def _known(self, session: AsyncSession) -> Job | None:
        """The job of a request that was the same, if there was one."""
        with_job = keys.outerjoin(jobs, jobs.c.id == keys.c.job_id)
        alive = self._is_mine & (keys.c.expires_at >= func.now())
        statement = select(keys.c.fingerprint, jobs).select_from(with_job).where(alive)
        found = (await _run(session, statement)).mappings().one_or_none()
        if found is None:
            return None
        row = dict(found)
        if row.pop("fingerprint") != self._fingerprint:
            raise IdempotencyError(REUSED_KEY)
        if row["id"] is None:
            raise IdempotencyError(EXPIRED_JOB)
        job = Job(**row)
        job.joined = True
        return job

    async def _taken(self, session: AsyncSession) -> bool:
        """Take the key, unless another transaction is about to, or a request has it and it has not expired."""
        row = [literal(value, keys.c[name].type) for name, value in self._row.items()]
        free = select(*row, func.now() + self._expires).where(func.pg_try_advisory_xact_lock(self._number))
        new = insert(keys).from_select([*self._row, "expires_at"], free)
        renewed = {name: new.excluded[name] for name in ("fingerprint", "expires_at")} | {"job_id": None}
        taken = new.on_conflict_do_update(
            index_elements=[keys.c.scope, keys.c.key], set_=renewed, where=keys.c.expires_at < func.now()
        )
        return (await _run(session, taken.returning(keys.c.key))).one_or_none() is not None

    async def _wait(self, session: AsyncSession, pause: float) -> None:
        """For the transaction that has the key: inside PostgreSQL, which sees deadlocks, if this one has locks too."""
        if await interruptible(_released(session)):
            await asyncio.sleep(random.uniform(pause / 2, pause))
        else:
            await _run(session, select(func.pg_advisory_xact_lock(self._number)))


_mutexes: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, int], asyncio.Lock] = WeakValueDictionary()
"""Of the requests with one key in this process one polls PostgreSQL for the key, and the others wait for that one."""


async def _released(session: AsyncSession) -> bool:
    """End the transaction, unless it has written or is in a caller's block; whether there is none now."""
    if session.in_transaction():
        if is_explicit(session) or holds_lock(session) or await has_written(session):
            return False
        await end_transaction(session)
    return True


async def _run(session: AsyncSession, statement: Executable) -> CursorResult[Any]:
    return await interruptible(session.run_sync(execute, statement))


def idempotency(
    *, caller: Callable[[Request], str | None] | None = None, expires: Seconds = EXPIRY_SECONDS, required: bool = False
) -> Callable[..., Awaitable[Idempotency]]:
    """A dependency: `Annotated[Idempotency, Depends(idempotency(caller=user_id))]`.

    `caller` identifies the client as the application knows it: a principal, not a credential, which others may share
    or which may change between two attempts. Keys are apart for each caller, method and route; `""` is for all clients
    together. Without `caller`, or where it gives None, a key is answered 400. They expire after `expires` seconds.
    400 too for a malformed key, or a missing one that is `required`. Reads the body, so not for forms.
    """
    if iscoroutinefunction(caller):
        raise ValueError("caller is a plain function; of an asynchronous one each request would be another caller's")
    if required and caller is None:
        raise ValueError("idempotency(required=True) needs caller=, which tells whose keys they are")
    kept = timedelta(seconds=span("expires", expires))

    async def read(request: Request, _key: Annotated[str | None, IDEMPOTENCY_KEY] = None) -> Idempotency:
        key = _sent(request.headers.getlist("idempotency-key"))
        if key is None:
            if required:
                raise IdempotencyError(MISSING_KEY)
            return Idempotency(None, "", "", kept)
        who = None if caller is None else caller(request)
        if who is None:  # which would be the same one for all whom the application does not know
            raise IdempotencyError(UNSCOPED_KEY)
        scope = _digest(who, request.method, _route(request))
        return Idempotency(key, scope, await _fingerprint(request), kept)

    return read


def _sent(values: list[str]) -> str | None:
    """A structured field's string (RFC 9651, section 3.3.3), or bare."""
    if not values:
        return None
    quoted, bare = _STRING.fullmatch(values[0]), _BARE.fullmatch(values[0])
    if len(values) > 1 or not (quoted or bare) or len(values[0]) > MAX_KEY_LENGTH:
        raise IdempotencyError(MALFORMED_KEY)
    return values[0] if quoted is None else re.sub(r"\\(.)", r"\1", quoted[1])


def _route(request: Request) -> str:
    """The path with its parameters' names; a route alone does not know under which prefix it was included."""
    route = request.scope.get("route")
    template = str(getattr(route, "path_format", ""))
    path: str = request.scope["path"]  # a URL is quoted, and a parameter is not
    return path.removesuffix(template.format(**request.path_params)) + template


async def _fingerprint(request: Request) -> str:
    """Of the request: path, query, and body, which as JSON may be written in many ways."""
    body = await request.body()
    with suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return _digest(request.scope["path"], request.scope["query_string"].decode("latin-1"), body)


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(ascii(parts).encode()).hexdigest()
