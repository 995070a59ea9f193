"""The long poll: who has the newest is told so, at once or when that has changed, and misses nothing in between."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import delete, text
from sqlalchemy.ext.asyncio import AsyncSession

from coord import create_db_dependency
from coord.http import Poll, poll
from tests.counter import URN, changed, placed
from tests.models import Account, User
from tests.serving import served
from tests.waits import registered
from worker.models import Order, OrderStatus

if TYPE_CHECKING:
    import httpx
    from sqlalchemy.ext.asyncio import async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("orders", "nobody_left_waiting")

FIRST = '"1"'


async def read(http: httpx.AsyncClient, order_id: int, method: str = "GET", **headers: str) -> httpx.Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return await http.request(method, f"/orders/{order_id}", headers=fields)


async def test_an_answer_has_the_version_as_its_tag(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    answer = await read(http, order_id)
    assert (answer.status_code, answer.headers["etag"], answer.json()["status"]) == (200, FIRST, "pending")
    assert answer.headers["cache-control"] == "no-cache"
    await changed(session_maker, order_id)
    answer = await read(http, order_id)
    assert (answer.headers["etag"], answer.json()["status"]) == ('"2"', "fulfilled")


@pytest.mark.parametrize("tags", [FIRST, 'W/"1"', '"0", "1"', '"a,b" , W/"1"', "*", '"","1"', ', ,"1",,'])
async def test_a_client_that_has_the_row_gets_a_304_at_once(http: httpx.AsyncClient, tags: str, order_id: int) -> None:
    answer = await read(http, order_id, If_None_Match=tags)
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", FIRST)
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-type" not in answer.headers
    assert "preference-applied" not in answer.headers
    assert answer.elapsed.total_seconds() < 1


@pytest.mark.parametrize("tags", ['"2"', '"11"', "1", 'w"1"', '"1', '"*"', '*, "2"', '"x1"', "", '"0,1"'])
async def test_a_client_that_has_another_version_gets_the_row_at_once(
    http: httpx.AsyncClient, tags: str, order_id: int
) -> None:
    answer = await read(http, order_id, If_None_Match=tags, Prefer="wait=20")
    assert (answer.status_code, answer.headers["etag"]) == (200, FIRST)
    assert "preference-applied" not in answer.headers
    assert answer.elapsed.total_seconds() < 1


async def test_a_tag_may_come_in_one_of_several_lines(http: httpx.AsyncClient, order_id: int) -> None:
    answer = await http.get(f"/orders/{order_id}", headers=[("If-None-Match", '"7"'), ("If-None-Match", FIRST)])
    assert answer.status_code == 304


async def test_a_request_without_a_tag_does_not_wait(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    answer = await read(http, await placed(session_maker), Prefer="wait=20")
    assert (answer.status_code, answer.elapsed.total_seconds() < 1) == (200, True)
    assert "preference-applied" not in answer.headers


@pytest.mark.parametrize("tags", [FIRST, "*"])
async def test_a_change_during_the_wait_is_the_answer(
    http: httpx.AsyncClient, session_maker: SessionMaker, tags: str, order_id: int
) -> None:
    polling = asyncio.create_task(read(http, order_id, If_None_Match=tags, Prefer="wait=20"))
    await registered()
    assert not polling.done()
    await changed(session_maker, order_id)
    answer = await polling
    assert (answer.status_code, answer.headers["etag"], answer.json()["status"]) == (200, '"2"', "fulfilled")
    assert answer.headers["preference-applied"] == "wait=20"


async def test_a_change_between_two_polls_is_not_missed(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    tag = (await read(http, order_id)).headers["etag"]
    await changed(session_maker, order_id)
    answer = await read(http, order_id, If_None_Match=tag, Prefer="wait=20")
    assert (answer.status_code, answer.headers["etag"], answer.elapsed.total_seconds() < 1) == (200, '"2"', True)


async def test_a_change_of_anything_in_the_row_counts(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    polling = asyncio.create_task(read(http, order_id, If_None_Match=FIRST, Prefer="wait=20"))
    await registered()
    await changed(session_maker, order_id, OrderStatus.PENDING)
    answer = await polling
    assert (answer.status_code, answer.headers["etag"], answer.json()["status"]) == (200, '"2"', "pending")


async def test_a_change_to_another_version_that_the_client_has_is_a_304(
    http: httpx.AsyncClient, session_maker: SessionMaker, order_id: int
) -> None:
    both = asyncio.create_task(read(http, order_id, If_None_Match='"1", "2"', Prefer="wait=20"))
    first = asyncio.create_task(read(http, order_id, If_None_Match=FIRST, Prefer="wait=20"))
    await registered()
    await changed(session_maker, order_id)
    assert (await first).headers["etag"] == '"2"'  # they share their looks at the row
    await changed(session_maker, order_id)
    assert (await both).headers["etag"] == '"3"'


async def test_a_wait_without_a_change_ends_in_a_304(http: httpx.AsyncClient, order_id: int) -> None:
    answer = await read(http, order_id, If_None_Match=FIRST, Prefer="wait=1")
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", FIRST)
    assert answer.headers["preference-applied"] == "wait=1"
    assert 1 <= answer.elapsed.total_seconds() < 1.9


@pytest.mark.parametrize("prefer", ["wait=0", "respond-async", "wait=soon", "return=minimal"])
async def test_a_request_without_prefer_wait_does_not_wait(
    http: httpx.AsyncClient, session_maker: SessionMaker, prefer: str
) -> None:
    answer = await read(http, await placed(session_maker), If_None_Match=FIRST, Prefer=prefer)
    assert (answer.status_code, answer.elapsed.total_seconds() < 1) == (304, True)
    assert "preference-applied" not in answer.headers


async def test_a_row_that_goes_meanwhile_is_a_404(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    polling = asyncio.create_task(read(http, order_id, If_None_Match=FIRST, Prefer="wait=20"))
    await registered()
    async with session_maker() as session, session.begin():
        await session.execute(delete(Order))
    answer = await polling
    assert (answer.status_code, answer.json()["type"]) == (404, f"{URN}not-found")
    assert (await read(http, order_id, If_None_Match="*")).status_code == 404


async def test_head_is_answered_as_get_without_the_body(http: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    get, head = await read(http, order_id), await read(http, order_id, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    get.headers.pop("date"), head.headers.pop("date")
    assert head.headers == get.headers
    assert (await read(http, order_id, "HEAD", If_None_Match=FIRST)).status_code == 304
    assert (await read(http, order_id + 1, "HEAD")).status_code == 404
    polling = asyncio.create_task(read(http, order_id, "HEAD", If_None_Match=FIRST, Prefer="wait=20"))
    await registered()
    await changed(session_maker, order_id)
    assert ((await polling).headers["etag"], (await polling).content) == ('"2"', b"")
    assert (await http.head(f"/orders/{order_id}/fulfil")).status_code == 405


async def test_a_key_of_two_columns_can_be_polled_and_a_row_without_a_version_cannot(
    session_maker: SessionMaker, tables: None
) -> None:
    app = FastAPI()
    get_db = create_db_dependency(session_maker)

    @app.get("/accounts")
    async def account(poll: Poll = Depends(poll), session: AsyncSession = Depends(get_db)) -> Any:
        found = await poll.changed(session, await session.get_one(Account, ("north", 3)))
        return found.balance if found else poll.not_modified()

    @app.get("/users")
    async def user(poll: Poll = Depends(poll), session: AsyncSession = Depends(get_db)) -> Any:
        with pytest.raises(ValueError, match="User has no version_id_col"):
            await poll.changed(session, User(id=1))

    async with session_maker() as session, session.begin():
        session.add(Account(region="north", number=3))
    async with served(app) as client:
        polling = asyncio.create_task(client.get("/accounts", headers={"If-None-Match": "*", "Prefer": "wait=20"}))
        await registered()
        async with session_maker() as session, session.begin():
            await session.execute(text("UPDATE accounts SET balance = 5, version = version + 1"))
        assert (await polling).json() == 5
        assert (await client.get("/users")).status_code == 200
