"""Who may see the console and who may act, and what keeps other sites from acting for a browser that has signed in."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from coord import JobState
from coord.console import access as under_test
from coord.console import console
from coord.console.access import COOKIE
from tests.desk import FULL, READ, fields_of, mounted, signed_in
from tests.ledger import committed
from tests.serving import served

if TYPE_CHECKING:
    from tests.ledger import SessionMaker

pytestmark = pytest.mark.usefixtures("ledger")

NOBODY = "01a229fa-c784-7e9a-b330-76f9886add7a"
PATHS = ["", "locks", "waits", "jobs", f"jobs/{NOBODY}", f"jobs/{NOBODY}/retry", "bulk/cancel", "queues/pause?queue=x"]
POSTS = [f"jobs/{NOBODY}/retry", f"jobs/{NOBODY}/cancel", "bulk/retry", "bulk/cancel", "queues/pause", "queues/resume"]
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}


async def state_of(session_maker: SessionMaker, job: Any) -> JobState:
    async with session_maker() as session:
        found = await session.get(type(job), job.id)
    assert found is not None
    state: JobState = found.state
    return state


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_without_a_token_the_console_is_closed_and_says_how_to_open_it(
    session_maker: SessionMaker, method: str
) -> None:
    job = await committed(session_maker, "a_secret_task")
    app = FastAPI()
    app.mount("/console", console(session_maker))
    async with served(app) as client:
        for path in [*PATHS, f"jobs/{job.id}"] if method == "GET" else [*POSTS, "sign-out"]:
            for accept in ("text/html", "text/event-stream"):
                answer = await client.request(method, f"/console/{path}", headers={"Accept": accept})
                assert answer.status_code == 403
                assert "full_token=" in answer.text
                assert "a_secret_task" not in answer.text
        assert (await client.post("/console/sign-in", data={"token": ""})).status_code == 403


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("accept", ["text/html", "text/event-stream"])
async def test_who_has_not_signed_in_is_asked_to_and_told_nothing(
    session_maker: SessionMaker, path: str, accept: str
) -> None:
    await committed(session_maker, "a_secret_task")
    async with signed_in(mounted(session_maker), None) as client:
        answer = await client.get(path, headers={"Accept": accept})
    assert answer.status_code == 403
    assert "Sign in" in answer.text
    assert "a_secret_task" not in answer.text


@pytest.mark.parametrize("token", ["", FULL[:-1], f"{FULL}x", FULL.upper(), "ü" * 20, "\0"])
async def test_a_wrong_token_signs_nobody_in(session_maker: SessionMaker, token: str) -> None:
    async with signed_in(mounted(session_maker), None) as client:
        answer = await client.post("sign-in", data={"token": token})
        assert answer.status_code == 403
        assert COOKIE not in answer.cookies
        assert (await client.get("jobs")).status_code == 403


async def test_tokens_are_compared_in_constant_time_with_each_there_is(
    session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    compare = secrets.compare_digest

    def noted(given: Any, known: Any) -> bool:
        seen.append(known)
        return bool(compare(given, known))

    monkeypatch.setattr(secrets, "compare_digest", noted)
    async with signed_in(mounted(session_maker), FULL):
        assert seen == [FULL.encode(), READ.encode()]


async def test_the_cookie_is_no_token_and_stays_with_the_console(session_maker: SessionMaker) -> None:
    async with served(mounted(session_maker)) as client:
        answer = await client.post("/console/sign-in", data={"token": FULL})
        cookie = answer.headers["set-cookie"]
        assert FULL not in cookie
        attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
        assert {"httponly", "samesite=strict"} <= attributes
        assert not any(part.startswith(("path", "domain")) for part in attributes)
        assert "Cookie" in (await client.get("/console/jobs")).request.headers
        assert "Cookie" not in (await client.get("/elsewhere")).request.headers


async def test_a_cookie_over_tls_is_for_tls_alone(session_maker: SessionMaker) -> None:
    async with signed_in(mounted(session_maker), None) as client:
        answer = await client.post("sign-in", data={"token": FULL}, headers={"X-Forwarded-Proto": "https"})
    assert "secure" in answer.headers["set-cookie"].lower()


@pytest.mark.parametrize(
    "forge",
    [
        lambda cookie: cookie.replace("read.", "full.", 1),
        lambda cookie: cookie[:-1] + ("A" if cookie[-1] != "A" else "B"),
        lambda cookie: re.sub(r"\.\d+\.", ".9999999999.", cookie, count=1),
        lambda cookie: "full.9999999999.x.",
        lambda cookie: "....",
        lambda cookie: "nobody.9999999999.x.y",
        lambda cookie: "full.\xfc.x.\xfc",
        lambda cookie: "",
    ],
)
async def test_a_cookie_that_was_tampered_with_is_none(session_maker: SessionMaker, forge: Any) -> None:
    async with signed_in(mounted(session_maker), READ) as client:
        forged = forge(client.cookies[COOKIE])
        client.cookies.clear()
        headers = [(b"cookie", f"{COOKIE}={forged}".encode("latin-1"))]
        assert (await client.get("jobs", headers=headers)).status_code == 403


async def test_a_session_ends_after_twelve_hours(session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "SESSION_SECONDS", -1)
    async with signed_in(mounted(session_maker), None) as client:
        answer = await client.post("sign-in", data={"token": FULL})
        cookie = answer.headers["set-cookie"].partition("=")[2].partition(";")[0]
        assert (await client.get("jobs", headers={"Cookie": f"{COOKIE}={cookie}"})).status_code == 403


async def test_another_console_with_another_token_knows_no_cookie_of_this_one(session_maker: SessionMaker) -> None:
    async with signed_in(mounted(session_maker), FULL) as client:
        cookie = client.cookies[COOKIE]
    app = FastAPI()
    app.mount("/console", console(session_maker, full_token="another token, rotated"))
    async with served(app) as client:
        answer = await client.get("/console/jobs", headers={"Cookie": f"{COOKIE}={cookie}"})
    assert answer.status_code == 403


async def test_signing_in_leads_where_one_wanted_to_go_and_out_leads_nowhere(session_maker: SessionMaker) -> None:
    async with signed_in(mounted(session_maker), None) as client:
        asked = await client.get("jobs?state=failed&task=a%20b")
        fields = fields_of(asked.text.replace("&amp;", "&"))
        assert fields == {"next": "jobs?state=failed&task=a%20b"}
        answer = await client.post("sign-in", data={**fields, "token": FULL})
        assert answer.headers["location"] == "./jobs?state=failed&task=a%20b"
        page = (await client.get("jobs")).text
        token = page.partition('name="form_token" value="')[2].partition('"')[0]
        answer = await client.post("sign-out", data={"form_token": token})
        assert answer.status_code == 303
        assert (await client.get("jobs")).status_code == 403


@pytest.mark.parametrize("onward", ["//evil.example", "https://evil.example", "\\evil", "x\r\nSet-Cookie: a=b", "a//b"])
async def test_signing_in_leads_to_no_other_site(session_maker: SessionMaker, onward: str) -> None:
    async with signed_in(mounted(session_maker), None) as client:
        answer = await client.post("sign-in", data={"token": FULL, "next": onward})
    assert answer.headers["location"] == "./"


@pytest.mark.parametrize("path", [*PATHS, "nowhere", "sign-in"])
async def test_every_page_has_the_headers(session_maker: SessionMaker, path: str) -> None:
    app = mounted(session_maker)
    async with signed_in(app, FULL) as client, signed_in(app, None) as nobody:
        for each in (client, nobody):
            answer = await each.get(path)
            assert answer.status_code < 500
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({}, {"form_token": ""}),
        ({}, {"form_token": "x" * 43}),
        ({"Origin": "https://evil.example"}, {}),
        ({"Origin": "null"}, {}),
        ({"Origin": "http://127.0.0.1:1"}, {}),
        ({"Sec-Fetch-Site": "cross-site"}, {}),
        ({"Sec-Fetch-Site": "same-site"}, {}),
        ({"Sec-Fetch-Site": "none"}, {}),
    ],
)
async def test_a_form_of_another_site_does_nothing(
    session_maker: SessionMaker, headers: dict[str, str], fields: dict[str, str]
) -> None:
    job = await committed(session_maker)
    async with signed_in(mounted(session_maker)) as client:
        own = fields_of((await client.get(f"jobs/{job.id}/cancel")).text)
        for path in (f"jobs/{job.id}/cancel", "bulk/cancel", "queues/pause", "sign-out"):
            answer = await client.post(path, data={**own, "queue": "default", **fields}, headers=headers)
            assert answer.status_code == 403, path
        assert (await client.get("jobs")).status_code == 200
        assert "paused" not in (await client.get("")).text
    assert await state_of(session_maker, job) is JobState.QUEUED


async def test_a_proxy_that_renames_the_host_is_in_nobodys_way(session_maker: SessionMaker) -> None:
    """A browser has compared the origins itself, where it says so."""
    headers = {"Origin": "https://console.example", "Sec-Fetch-Site": "same-origin"}
    async with signed_in(mounted(session_maker), None) as client:
        assert (await client.post("sign-in", data={"token": FULL}, headers=headers)).status_code == 303


async def test_the_form_token_of_one_session_is_not_that_of_another(session_maker: SessionMaker) -> None:
    job = await committed(session_maker)
    app = mounted(session_maker)
    async with signed_in(app) as one, signed_in(app) as other:
        fields = fields_of((await one.get(f"jobs/{job.id}/cancel")).text)
        assert (await other.post(f"jobs/{job.id}/cancel", data=fields)).status_code == 403
    assert await state_of(session_maker, job) is JobState.QUEUED


async def test_a_look_changes_nothing(session_maker: SessionMaker) -> None:
    job = await committed(session_maker)
    async with signed_in(mounted(session_maker)) as client:
        for path in (f"jobs/{job.id}/cancel", "bulk/cancel", "queues/pause?queue=default"):
            assert (await client.get(path)).status_code == 200
            for method in ("PUT", "DELETE", "PATCH"):
                assert (await client.request(method, path)).status_code == 405
        assert (await client.get("sign-out")).status_code == 405
        assert "paused" not in (await client.get("")).text
    assert await state_of(session_maker, job) is JobState.QUEUED


async def test_a_reader_may_not_act_and_is_offered_nothing(session_maker: SessionMaker) -> None:
    job = await committed(session_maker)
    async with signed_in(mounted(session_maker), READ) as client:
        for path in ("", "jobs?state=queued", f"jobs/{job.id}"):
            page = (await client.get(path)).text
            assert "read only" in page
            assert not re.search(r"/(cancel|retry|pause)[?\"]", page), path
        token = page.partition('name="form_token" value="')[2].partition('"')[0]
        for path in (f"jobs/{job.id}/cancel", "bulk/cancel", "queues/pause"):
            assert (await client.get(f"{path}?queue=default")).status_code == 403
            answer = await client.post(path, data={"form_token": token, "queue": "default"})
            assert answer.status_code == 403
            assert "only reads" in answer.text
    assert await state_of(session_maker, job) is JobState.QUEUED


async def test_a_form_that_is_too_large_is_not_read(session_maker: SessionMaker) -> None:
    async with signed_in(mounted(session_maker), None) as client:
        assert (await client.post("sign-in", data={"token": "x" * 100_000})).status_code == 413


@pytest.mark.parametrize(
    "tokens",
    [{"full_token": "x" * 15}, {"read_token": ""}, {"full_token": FULL, "read_token": FULL}],
    ids=["short", "empty", "equal"],
)
async def test_tokens_that_protect_nothing_are_refused(session_maker: SessionMaker, tokens: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="token"):
        console(session_maker, **tokens)


@pytest.mark.parametrize("name", ["full_token", "read_token"])
async def test_an_empty_token_is_refused_by_name_and_none_is_what_closes(
    session_maker: SessionMaker, name: str
) -> None:
    tokens: Any = {name: ""}
    with pytest.raises(ValueError, match=f"{name} has at least 16 characters, or is None: .* closed"):
        console(session_maker, **tokens)
