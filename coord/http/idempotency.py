"""`Idempotency-Key`: a request that is sent again joins the job of the first, and gets its answer."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, overload

from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from starlette.exceptions import HTTPException

from coord.durations import seconds
from coord.jobs.enqueueing import enqueue
from coord.jobs.ledger import Job, jobs, keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.durations import Seconds
    from coord.jobs.options import P, Task, TaskOptions

DAY = 86_400
_STRING = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z:/=-]+")
LONGEST = 255
"""Characters of a key."""


class IdempotencyError(HTTPException):
    """The key cannot be used: 400 if it is malformed, 422 if another request has it."""

    def __init__(self, status: int, detail: str, kind: str) -> None:
        super().__init__(status, detail)
        self.kind = kind


class Idempotency:
    """One request's key, if it has one: whose it is, and what it was used for."""

    def __init__(self, key: str | None, scope: str, fingerprint: str, expires: timedelta) -> None:
        self.key = key
        self._scope = scope
        self._fingerprint = fingerprint
        self._expires = expires

    @overload
    async def enqueue(self, session: AsyncSession, task: str, *args: Any, **kwargs: Any) -> Job: ...
    @overload
    async def enqueue(
        self, session: AsyncSession, task: Task[P] | TaskOptions[P], *args: P.args, **kwargs: P.kwargs
    ) -> Job: ...
    async def enqueue(self, session: AsyncSession, task: Any, *args: Any, **kwargs: Any) -> Job:
        """As `coord.enqueue`, or with a key that was used before, that request's job (`job.joined`).

        The key is unique with the job, in the caller's transaction: a request that comes while the first is not yet
        committed waits for that. Raises `IdempotencyError`, 422, when the key belongs to a request with another path,
        query or body.
        """
        if self.key is None:
            return await enqueue(session, task, *args, **kwargs)
        mine = (keys.c.scope == self._scope) & (keys.c.key == self.key)
        if await self._is_new(session):
            job = await enqueue(session, task, *args, **kwargs)
            await session.execute(update(keys).where(mine).values(job_id=job.id))
            return job
        with_job = keys.outerjoin(jobs, jobs.c.id == keys.c.job_id)
        found = select(keys.c.fingerprint, jobs).select_from(with_job).where(mine)
        row = dict((await session.execute(found)).mappings().one())
        if row.pop("fingerprint") != self._fingerprint:
            raise IdempotencyError(422, "another request has used this Idempotency-Key", "idempotency-key-reused")
        if row["id"] is None:
            raise IdempotencyError(422, "the job of this Idempotency-Key is no longer known", "idempotency-key-expired")
        job = Job(**row)
        job.joined = True
        return job

    async def _is_new(self, session: AsyncSession) -> bool:
        """Take the key, or one that has expired."""
        row = {"scope": self._scope, "key": self.key, "fingerprint": self._fingerprint}
        new = insert(keys).values(row | {"expires_at": func.now() + self._expires})
        renewed = {name: new.excluded[name] for name in ("fingerprint", "expires_at")} | {"job_id": None}
        taken = new.on_conflict_do_update(
            index_elements=[keys.c.scope, keys.c.key], set_=renewed, where=keys.c.expires_at < func.now()
        )
        return (await session.execute(taken.returning(keys.c.key))).one_or_none() is not None


def idempotency(
    *, caller: Callable[[Request], str] | None = None, expires: Seconds = DAY, required: bool = False
) -> Callable[[Request], Awaitable[Idempotency]]:
    """A dependency: `Annotated[Idempotency, Depends(idempotency())]`.

    Keys are apart for each `caller`, by default for each `Authorization` header, and each method and route. They expire
    after `expires` seconds. Answers 400 for a malformed key, or a missing one that is `required`.
    """
    kept = timedelta(seconds=seconds("expires", expires))

    async def read(request: Request) -> Idempotency:
        key = _key(request.headers.getlist("idempotency-key"))
        if key is None and required:
            raise IdempotencyError(400, "this request needs an Idempotency-Key", "idempotency-key-missing")
        who = _authorization(request) if caller is None else caller(request)
        route = getattr(request.scope.get("route"), "path", request.url.path)
        scope = _digest(who, request.method, route)
        return Idempotency(key, scope, "" if key is None else await _fingerprint(request), kept)

    return read


def _key(values: list[str]) -> str | None:
    """A structured field's string (RFC 8941), or bare."""
    if not values:
        return None
    text = values[0].strip(" \t")
    if len(values) == 1 and (quoted := _STRING.fullmatch(text)):
        text = re.sub(r"\\(.)", r"\1", quoted[1])
    elif len(values) > 1 or not _TOKEN.fullmatch(text):
        raise IdempotencyError(400, "Idempotency-Key is one quoted string", "idempotency-key-malformed")
    if not 0 < len(text) <= LONGEST:
        raise IdempotencyError(400, f"Idempotency-Key has 1 to {LONGEST} characters", "idempotency-key-malformed")
    return text


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
