"""`Idempotency-Key`: a request that is sent again joins the job of the first, and gets its answer."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, overload

from fastapi import Header, Request
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from starlette.exceptions import HTTPException

from coord.durations import seconds
from coord.http.problem import EXPIRED_JOB, MALFORMED_KEY, MISSING_KEY, REUSED_KEY
from coord.jobs.enqueue import enqueue
from coord.jobs.model import Job, jobs, keys
from coord.session import get_transaction

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.durations import Seconds
    from coord.http.problem import Kind
    from coord.jobs.options import P, Task, TaskOptions

DAY = 86_400
LONGEST = 255
"""Characters of a key, as it is sent."""
_STRING = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])+)"')
_BARE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z:/=-]+")
IDEMPOTENCY_KEY = Header(
    alias="Idempotency-Key",
    description="One quoted string of 1 to 255 characters, of the client's making: once for each thing to be done.",
    json_schema_extra={"pattern": rf"^({_STRING.pattern}|{_BARE.pattern})$", "maxLength": LONGEST},
)


class IdempotencyError(HTTPException):
    """The key cannot be used: 400 if it is malformed, 422 if another request has it."""

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

    async def check(self, session: AsyncSession) -> None:
        """For a request that is answered without a job: raises what `enqueue` would, and keeps nothing."""
        if self.key is not None:
            await self._known(session)

    @overload
    async def enqueue(self, session: AsyncSession, task: str, *args: Any, **kwargs: Any) -> Job: ...
    @overload
    async def enqueue(
        self, session: AsyncSession, task: Task[P] | TaskOptions[P], *args: P.args, **kwargs: P.kwargs
    ) -> Job: ...
    async def enqueue(self, session: AsyncSession, task: Any, *args: Any, **kwargs: Any) -> Job:
        """As `coord.enqueue`, or with a key that was used before, that request's job (`job.joined`).

        The key is unique with the job, in a savepoint of the caller's transaction, before which pending changes are
        flushed. A request that comes while the first is not yet committed waits for that; where `coord.enqueue` raises,
        the key was not used. Raises `IdempotencyError`, 422, when the key belongs to a request with another path, query
        or body.
        """
        if self.key is None:
            return await enqueue(session, task, *args, **kwargs)
        while (known := await self._known(session)) is None:  # looked for first: who joins writes nothing
            async with get_transaction(session):  # or a 4xx for what enqueue raises would commit a key with no job
                if await self._taken(session):
                    job = await enqueue(session, task, *args, **kwargs)
                    await session.execute(update(keys).where(self._is_mine).values(job_id=job.id))
                    return job
        return known

    async def _known(self, session: AsyncSession) -> Job | None:
        """The job of a request that was the same, if there was one."""
        with_job = keys.outerjoin(jobs, jobs.c.id == keys.c.job_id)
        alive = self._is_mine & (keys.c.expires_at >= func.now())
        statement = select(keys.c.fingerprint, jobs).select_from(with_job).where(alive)
        found = (await session.execute(statement)).mappings().one_or_none()
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
        """Take the key, if nobody has it or has had it too long ago; waits for who is about to."""
        new = insert(keys).values(self._row | {"expires_at": func.now() + self._expires})
        renewed = {name: new.excluded[name] for name in ("fingerprint", "expires_at")} | {"job_id": None}
        taken = new.on_conflict_do_update(
            index_elements=[keys.c.scope, keys.c.key], set_=renewed, where=keys.c.expires_at < func.now()
        )
        return (await session.execute(taken.returning(keys.c.key))).one_or_none() is not None


def idempotency(
    *, caller: Callable[[Request], str] | None = None, expires: Seconds = DAY, required: bool = False
) -> Callable[..., Awaitable[Idempotency]]:
    """A dependency: `Annotated[Idempotency, Depends(idempotency())]`.

    Keys are apart for each `caller`, by default for each `Authorization` header, and each method and route. They expire
    after `expires` seconds. Answers 400 for a malformed key, or a missing one that is `required`. Reads the body, so
    not for forms.
    """
    kept = timedelta(seconds=seconds("expires", expires))
    who = caller or _authorization

    async def read(request: Request, _key: Annotated[str | None, IDEMPOTENCY_KEY] = None) -> Idempotency:
        key = _sent(request.headers.getlist("idempotency-key"))
        if key is None and required:
            raise IdempotencyError(MISSING_KEY)
        scope = _digest(who(request), request.method, _route(request))
        return Idempotency(key, scope, "" if key is None else await _fingerprint(request), kept)

    return read


def _sent(values: list[str]) -> str | None:
    """A structured field's string (RFC 9651, section 3.3.3), or bare."""
    if not values:
        return None
    quoted, bare = _STRING.fullmatch(values[0]), _BARE.fullmatch(values[0])
    if len(values) > 1 or not (quoted or bare) or len(values[0]) > LONGEST:
        raise IdempotencyError(MALFORMED_KEY)
    return values[0] if quoted is None else re.sub(r"\\(.)", r"\1", quoted[1])


def _route(request: Request) -> str:
    """The path with its parameters' names; a route alone does not know under which prefix it was included."""
    route = request.scope.get("route")
    template = str(getattr(route, "path_format", ""))
    return request.url.path.removesuffix(template.format(**request.path_params)) + template


def _authorization(request: Request) -> str:
    return request.headers.get("authorization", "")


async def _fingerprint(request: Request) -> str:
    """Of what was asked for: path, query, and body, which as JSON may be written in many ways."""
    body = await request.body()
    with suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return _digest(request.url.path, request.url.query, body)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        text = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(len(text).to_bytes(8) + text)
    return digest.hexdigest()
