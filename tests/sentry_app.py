"""Sentry's SDK with all that it enables by itself, in a process of its own: what it patches stays patched.

Prints what Sentry would have been sent, as JSON, by a transport that sends nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import sentry_sdk
from sentry_sdk.transport import Transport

if TYPE_CHECKING:
    from sentry_sdk.envelope import Envelope

sent: list[dict[str, Any]] = []


class Kept(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        sent.extend(item.payload.json for item in envelope.items if item.payload.json is not None)


sentry_sdk.init("http://key@127.0.0.1:1/1", transport=Kept, traces_sample_rate=1.0)

# After it, as its documentation asks for.
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from tests.pooler import UNTOLD
from tests.round_trip import application, rename, running


async def fail(ctx: dict[str, Any]) -> None:
    raise ZeroDivisionError("the task's own")


async def main(database_url: str, redis_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=15, **UNTOLD)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    app = application(maker, redis_url)

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("the handler's own")

    async with running(app, [rename, fail], maker, redis_url, database_url) as http:
        answer = (await http.post("/users/1")).json()
        status = (await http.get("/broken")).status_code
    await engine.dispose()
    integrations = sorted(sentry_sdk.get_client().integrations)
    print(json.dumps({"answer": answer, "status": status, "integrations": integrations, "sent": sent}, default=str))


asyncio.run(main(*sys.argv[1:]))
