"""The console under test: where it is mounted, its tokens, and a browser or a client that has signed in."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from coord.console import console
from tests.serving import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from tests.ledger import SessionMaker

FULL, READ = "full token of the tests", "read token of the tests"


def mounted(session_maker: SessionMaker, *, at: str = "/console", behind: str | None = None) -> Any:
    """An application with a console."""
    app = FastAPI()
    app.mount(at, console(session_maker, full_token=FULL, read_token=READ))
    return app if behind is None else _Behind(app, behind)


class _Behind:
    """A server that was told its proxy's prefix, which is in the path or is not."""

    def __init__(self, app: FastAPI, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app({**scope, "root_path": self._root_path}, receive, send)


@contextlib.asynccontextmanager
async def signed_in(app: Any, token: str | None = FULL, *, at: str = "/console/") -> AsyncIterator[httpx.AsyncClient]:
    """A client whose addresses are within the console."""
    async with served(app) as client:
        client.base_url = client.base_url.join(at)
        if token is not None:
            answer = await client.post("sign-in", data={"token": token})
            assert answer.status_code == 303, answer.text
        yield client


async def confirmed(client: httpx.AsyncClient, path: str) -> httpx.Response:
    """What an action answers, once its confirmation page was sent back."""
    asked = await client.get(path)
    assert asked.status_code == 200, asked.text
    return await client.post(path.partition("?")[0], data=fields_of(asked.text))


def fields_of(page: str) -> dict[str, str]:
    """The hidden fields of a page's form."""
    form = page.rpartition('<form method="post"')[2]
    return dict(re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', form))
