"""The console over a real socket: what its pages show, to whom, and what they cost."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import (
    JobState,
    LockTimeoutError,
    advisory_lock,
    create_ledger,
    enqueue,
    task_options,
    wait_for_row_change,
)
from coord.console import console, live
from coord.console.desk import LOCKS_INTERVAL_SECONDS
from coord.console.live import Reads, UnreadableError
from coord.console.wording import count, span
from coord.fleet import Number
from coord.jobs.model import attempts, jobs
from coord.observation import observers
from coord.telemetry import REQUEST_ID
from coord.timings import ATTEMPT_TIMINGS, AttemptTimings
from tests.desk import FULL, READ, mounted, signed_in
from tests.ledger import a_task, committed, executed
from tests.models import User
from tests.proxy import Proxy
from tests.serving import all_given_back, engine_at, eventually
from tests.shop import empty_database

if TYPE_CHECKING:
    import uuid
    from collections.abc import AsyncIterator

    import httpx
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.ledger import SessionMaker

pytestmark = pytest.mark.usefixtures("ledger")

SCRIPT = "<script>alert('x')</script>"
LIVE_PAGES = ("", "locks", "waits", "jobs")


@pytest.fixture
async def full(session_maker: SessionMaker) -> AsyncIterator[httpx.AsyncClient]:
    async with signed_in(mounted(session_maker)) as client:
        yield client


async def ended(session_maker: SessionMaker, state: JobState, **values: Any) -> uuid.UUID:
    job = await committed(session_maker, values.pop("task", a_task), *values.pop("arguments", ()))
    async with session_maker.begin() as session:
        await session.execute(update(jobs).where(jobs.c.id == job.id).values(state=state, **values))
    return job.id


async def many(session_maker: SessionMaker, number: int, **values: Any) -> None:
    """Jobs that have ended, in one statement."""
    rows = text(
        "INSERT INTO coord_jobs (id, task, queue, arguments, state, finished_at, started_at) "
        "SELECT overlay(gen_random_uuid()::text PLACING lpad(to_hex(n), 8, '0') FROM 1 FOR 8)::uuid, :task, 'default', "
        "'[[],{}]', :state, now(), now() FROM generate_series(1, :number) AS n"
    )
    async with session_maker.begin() as session:
        await session.execute(rows, {"task": "many", "state": "done", "number": number, **values})


@pytest.mark.parametrize("path", [*LIVE_PAGES, "jobs/01a229fa-c784-7e9a-b330-76f9886add7a"])
async def test_the_first_look_at_an_empty_ledger_says_what_to_do(full: httpx.AsyncClient, path: str) -> None:
    answer = await full.get(path)
    assert answer.status_code == (404 if "/" in path else 200)
    assert ("there is no job" if "/" in path else 'class="empty"') in answer.text


async def test_the_overview_counts_jobs_by_state_task_and_queue(
    full: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    await committed(session_maker)
    await committed(session_maker, task_options("later", delay=timedelta(hours=1), queue="letters"))
    for _ in range(3):
        await ended(session_maker, JobState.FAILED, task="broken", finished_at=text("now()"))
    page = (await full.get("")).text
    assert "3 failed, 0 running" in page
    assert 'href="./jobs?state=failed&amp;task=broken">3</a>' in page
    assert "letters" in page
    assert "unattended" in page


async def test_what_was_done_in_the_last_hour_is_drawn_and_told_in_words(
    full: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    await many(session_maker, 120)
    page = (await full.get("")).text
    assert "<b>120</b> done" in page
    assert 'role="img" aria-label="Jobs finished in each of the last 60 minutes: at most 120 in one' in page


async def test_whatever_a_job_says_is_shown_as_text(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    job = await ended(
        session_maker,
        JobState.FAILED,
        task=task_options(SCRIPT, queue=SCRIPT, unique_key=SCRIPT),
        arguments=(SCRIPT,),
        error=SCRIPT,
        traceback=SCRIPT,
        trace={REQUEST_ID: SCRIPT},
    )
    for path in ("", "jobs", f"jobs/{job}", f"jobs/{job}/retry", f"jobs?task={SCRIPT}", f"queues/pause?queue={SCRIPT}"):
        answer = await full.get(path)
        assert answer.status_code == 200, path
        assert "<script>alert" not in answer.text, path
        assert "&lt;script&gt;alert" in answer.text, path
    answer = await full.get("jobs?age=<b>")
    assert (answer.status_code, "<b>" in answer.text) == (400, False)


async def test_the_timeline_of_a_job_whose_last_attempt_died_has_its_end(
    full: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    died = "WorkerDiedError: the worker that ran it died (attempt 10 of 10)"
    job_id = await ended(session_maker, JobState.FAILED, attempt=10, error=died, finished_at=func.now())
    async with session_maker.begin() as session:
        finished = select(jobs.c.finished_at).where(jobs.c.id == job_id).scalar_subquery()
        tried = {"job_id": job_id, "number": 10, "outcome": "died", "error": died, "ended": finished}
        await session.execute(insert(attempts).values(tried))
    timeline = (await full.get(f"jobs/{job_id}")).text.partition('<ol class="timeline">')[2].partition("</ol>")[0]
    titles = re.findall("<strong>(.*?)</strong>", timeline)
    assert titles == ["Enqueued", "Attempt 10: died", "Failed"]


async def test_a_job_with_half_a_surrogate_pair_is_shown(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    said = {"arguments": ("half: \ud800",), "result": "\udfff"}
    job = await ended(session_maker, JobState.DONE, finished_at=text("now()"), **said)
    answer = await full.get(f"jobs/{job}")
    assert answer.status_code == 200
    assert "half: ?" in answer.text


async def test_arguments_results_keys_and_tracebacks_are_for_the_full_token(session_maker: SessionMaker) -> None:
    secrets = {"error": "ValueError: (sqlalchemy.exc) [SQL: secret 1]", "traceback": "secret 2", "result": "secret 3"}
    task = task_options(a_task, unique_key="secret 4", one_at_a_time="secret 5")
    job = await ended(
        session_maker, JobState.FAILED, task=task, arguments=("secret 6",), finished_at=text("now()"), **secrets
    )
    app = mounted(session_maker)
    async with signed_in(app, FULL) as full, signed_in(app, READ) as reader:
        seen = (await full.get(f"jobs/{job}")).text
        assert [number for number in range(1, 7) if f"secret {number}" in seen] == [1, 2, 3, 4, 5, 6]
        for path in (f"jobs/{job}", "jobs", ""):
            answer = await reader.get(path)
            assert answer.status_code == 200
            assert "secret" not in answer.text
        assert "ValueError" in (await reader.get("jobs")).text


async def test_the_name_of_an_advisory_lock_is_for_the_full_token(session_maker: SessionMaker) -> None:
    job = await ended(session_maker, JobState.DONE, started_at=text("now()"), finished_at=text("now()"))
    failed = await ended(
        session_maker, JobState.FAILED, finished_at=text("now()"), error=await timed_out(session_maker)
    )
    app = mounted(session_maker)
    async with session_maker() as session:
        timings = session.info[ATTEMPT_TIMINGS] = AttemptTimings(str(job), 1, queue=0.0)
        async with advisory_lock(session, "ann@example.com"):
            timings.lock = 0.2
    for observer in observers:
        observer.attempt_ended("a_task", "done", timings)
    async with signed_in(app, FULL) as full, signed_in(app, READ) as reader:
        for path in (f"jobs/{job}", f"jobs/{failed}", "jobs", "locks"):
            assert "ann@example.com" in (await full.get(path)).text
            seen = (await reader.get(path)).text
            assert "ann@example.com" not in seen
            assert "advisory lock" in seen or "LockTimeoutError" in seen


async def timed_out(session_maker: SessionMaker) -> str:
    """What a job has as its error whose lock was somebody else's for too long."""
    async with session_maker() as holder, session_maker() as session, advisory_lock(holder, "ann@example.com"):
        with pytest.raises(LockTimeoutError) as caught:
            async with advisory_lock(session, "ann@example.com", timeout=0):
                pass
    return f"LockTimeoutError: {caught.value}"


async def test_pages_go_on_by_key_through_all_jobs_and_back(
    full: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    await many(session_maker, 120)
    seen: list[str] = []
    path = "jobs?state=done"
    while path:
        page = (await full.get(path)).text
        assert "<b>120</b> done jobs." in page
        found = [part.partition('"')[0] for part in page.split('<a href="./jobs/')[1:]]
        assert len(found) in (50, 20)
        seen += found
        rest = page.partition('" rel="next"')
        path = rest[0].rpartition('href="./')[2].replace("&amp;", "&") if rest[1] else ""
    assert len(seen) == len({*seen}) == 120
    assert seen == sorted(seen, reverse=True)


async def test_filters_narrow_by_state_task_queue_and_age(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    await committed(session_maker, "one")
    await committed(session_maker, task_options("two", queue="other"))
    old = await committed(session_maker, "three")
    async with session_maker.begin() as session:
        await session.execute(update(jobs).where(jobs.c.id == old.id).values(created_at=text("now() - interval '2 h'")))
    for query, expected in {
        "task=one": ["one"],
        "queue=other": ["two"],
        "age=over-an-hour": ["three"],
        "age=last-hour": ["two", "one"],
        "state=failed": [],
        "state=queued&task=two&queue=other&age=last-day": ["two"],
        "state=&task=&queue=&age=": ["three", "two", "one"],
    }.items():
        page = (await full.get(f"jobs?{query}")).text
        assert [part.partition("</a>")[0].rpartition(">")[2] for part in page.split('<th scope="row">')[1:]] == expected
    for query in ("state=odd", "age=odd", "before=odd", f"task={'x' * 201}"):
        assert (await full.get(f"jobs?{query}")).status_code == 400


@pytest.mark.slow
async def test_more_than_fifty_thousand_are_told_as_an_estimate_and_the_few_exactly(
    database_url: str, session_maker: SessionMaker
) -> None:
    async with empty_database(database_url) as url:
        engine = create_async_engine(url)
        own: SessionMaker = async_sessionmaker(engine, expire_on_commit=False)
        async with engine.begin() as connection:
            await create_ledger(connection)
        await many(own, 120_000)
        await ended(own, JobState.FAILED, task="rare")
        async with signed_in(mounted(own)) as client:
            page = (await client.get("jobs?state=done")).text
            number = int(page.partition("<b>about ")[2].partition("<")[0].replace(",", ""))
            assert 90_000 < number < 150_000
            assert "<b>1</b> failed job." in (await client.get("jobs?state=failed")).text
            overview = (await client.get("")).text
            assert 'state=failed&amp;task=rare">1</a>' in overview
            assert "about 1" in overview
            asked = (await client.get("bulk/retry?state=failed")).text
            assert "Retry 1 failed job?" in asked
        await engine.dispose()


async def test_a_ledger_in_a_schema_of_its_own_is_shown_and_acted_on(database_url: str) -> None:
    async with empty_database(database_url) as url:
        engine = create_async_engine(url)
        own: SessionMaker = async_sessionmaker(engine, expire_on_commit=False)
        async with engine.begin() as connection:
            await create_ledger(connection, schema="A Ledger")
        job = await committed(own)
        async with signed_in(mounted(own)) as client:
            for path in (*LIVE_PAGES, f"jobs/{job.id}", f"jobs/{job.id}/cancel", "bulk/cancel?state=queued"):
                assert (await client.get(path)).status_code == 200, path
            assert "a_task" in (await client.get("jobs")).text
        await engine.dispose()


async def first_event(answer: httpx.Response) -> tuple[str, str]:
    """The name and the text of an event stream's next event that has one."""
    name = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            return name, json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream has ended")


EVENTS = {"Accept": "text/event-stream"}


@pytest.mark.parametrize("path", LIVE_PAGES)
async def test_a_page_is_its_own_event_stream(full: httpx.AsyncClient, path: str) -> None:
    async with full.stream("GET", path, headers=EVENTS) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name, shown = await first_event(answer)
    assert name == "page"
    assert "form_token" not in shown
    assert "<html" not in shown


async def test_a_stream_tells_of_a_change(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    async with full.stream("GET", "jobs", headers=EVENTS) as answer:
        lines = answer.aiter_lines()

        async def told(what: str) -> None:
            async for line in lines:
                if line.startswith("data: ") and what in line:
                    return

        async with asyncio.timeout(20):
            await told("The ledger is empty")
            await committed(session_maker, "just_made")
            await told("just_made")


async def test_viewers_share_what_is_read_and_hold_no_connection(
    database_url: str, single: AsyncEngine, session_maker: SessionMaker
) -> None:
    """Ten who look for three intervals cost what one does, by a pool of one; a slow read is repeated less often."""
    own: SessionMaker = async_sessionmaker(single, expire_on_commit=False)
    async with signed_in(mounted(own)) as client:
        with executed(single) as seen:

            def reads() -> int:
                return sum("pg_blocking_pids" in statement for statement in seen)

            async def look() -> None:
                async with client.stream("GET", "locks", headers=EVENTS) as answer:
                    events = 0
                    async for line in answer.aiter_lines():
                        events += line.startswith((":", "event: "))
                        if events >= 3 and reads() >= 2:
                            return

            began = monotonic()
            async with asyncio.timeout(60):
                await asyncio.gather(*(look() for _ in range(10)))
            assert 2 <= reads() <= 1 + (monotonic() - began) / LOCKS_INTERVAL_SECONDS
            await all_given_back(single)
            looked = len(seen)
            await client.get("static/console.css")
            assert len(seen) == looked, "nobody looks, and something is read"


async def test_one_stream_too_many_is_refused_and_one_that_has_ended_counts_no_more(
    full: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coord.console.handlers.MAX_STREAMS", 1)
    async with full.stream("GET", "waits", headers=EVENTS) as answer:
        await first_event(answer)
        assert (await full.get("waits", headers=EVENTS)).status_code == 503
        assert (await full.get("waits")).status_code == 200

    async def admitted() -> bool:
        async with full.stream("GET", "waits", headers=EVENTS) as again:
            return again.status_code == 200

    await eventually(admitted, within=20)


async def test_a_stream_ends_by_itself(
    full: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, session_maker: SessionMaker
) -> None:
    monkeypatch.setattr("coord.console.live.MAX_STREAM_SECONDS", 0.5)
    async with asyncio.timeout(10):
        answer = await full.get("waits", headers=EVENTS)
    assert answer.status_code == 200
    assert "event: page" in answer.text


async def test_a_stream_that_is_asked_for_again_leaves_out_what_its_client_has(
    full: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coord.console.live.MAX_STREAM_SECONDS", 0.1)
    first = (await full.get("waits", headers=EVENTS)).text
    tag = first.partition("id: ")[2].partition("\n")[0]
    again = (await full.get("waits", headers={**EVENTS, "Last-Event-ID": tag})).text
    assert "event: page" in first
    assert "event: page" not in again


async def test_a_postgresql_that_is_away_is_said_and_looked_for_again() -> None:
    async with (
        engine_at("postgresql+asyncpg://nobody@127.0.0.1:1/nowhere") as engine,
        signed_in(mounted(async_sessionmaker(engine))) as client,
    ):
        answer = await client.get("jobs")
        assert answer.status_code == 503
        assert "PostgreSQL cannot be read" in answer.text
        async with client.stream("GET", "jobs", headers=EVENTS) as stream:
            assert (await first_event(stream))[0] == "away"


@pytest.mark.parametrize("fault", ["silent", "refused"])
@pytest.mark.parametrize("by", ["its own next look", "a look at something else"])
async def test_the_error_of_an_outage_is_shown_no_longer_than_that_lasts(
    database_url: str, monkeypatch: pytest.MonkeyPatch, fault: str, by: str
) -> None:
    """However seldom a read that takes so long would be repeated."""
    monkeypatch.setattr(live, "READ_TIMEOUT_SECONDS", 0.3)
    interval = 0.0 if by == "its own next look" else 600.0

    async def look(session: Any) -> Any:
        return await session.scalar(text("SELECT 1"))

    async with Proxy(database_url).opened() as way:
        engine = create_async_engine(way.url)
        reads = Reads(async_sessionmaker(engine))
        if fault == "silent":
            way.lose_everything()
        else:
            server, way.target = way.target, way.target.set(port=1)
        with pytest.raises(UnreadableError):
            await reads.get("counts", look, interval=interval, share=0.001)
        way.lead_again()
        if fault == "refused":
            way.target = server
        if by == "a look at something else":
            assert await reads.get("locks", look, interval=0) == 1
        assert await reads.get("counts", look, interval=interval, share=0.001) == 1
        await engine.dispose()


async def test_a_read_that_postgresql_gives_up_is_repeated_as_seldom_as_one_that_it_ends(
    session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has worked for either; and that others succeed changes nothing."""
    monkeypatch.setattr(live, "READ_TIMEOUT_SECONDS", 0.1)
    reads, times = Reads(session_maker), 0

    async def too_much(session: Any) -> None:
        nonlocal times
        times += 1
        await session.execute(text("SELECT pg_sleep(5)"))

    async def look(session: Any) -> Any:
        return await session.scalar(text("SELECT 1"))

    for _ in range(2):
        with pytest.raises(UnreadableError):
            await reads.get("hour", too_much, interval=0, share=0.001)
        assert await reads.get("locks", look, interval=0) == 1
    assert times == 1


async def test_a_slow_read_is_repeated_seldom(session_maker: SessionMaker) -> None:
    reads, times = Reads(session_maker), 0

    async def slow(session: Any) -> int:
        nonlocal times
        times += 1
        await session.execute(text("SELECT pg_sleep(0.2)"))
        return times

    assert [await reads.get("slow", slow, interval=0, share=0.01) for _ in range(3)] == [1, 1, 1]
    reads.forget()
    assert await reads.get("slow", slow, interval=0, share=0.01) == 2


async def test_a_read_that_takes_too_long_is_ended_by_postgresql(
    session_maker: SessionMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coord.console.live.READ_TIMEOUT_SECONDS", 0.2)

    async def slow(session: Any) -> None:
        await session.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises(UnreadableError):
        await Reads(session_maker).get("slow", slow, interval=0)


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("/console/", {}),
        ("/deep/in/it/", {"at": "/deep/in/it"}),
        ("/proxy/console/", {"behind": "/proxy"}),
        ("/console/", {"behind": "/proxy"}),
    ],
    ids=["mounted", "deeper", "behind a proxy that keeps its prefix", "behind one that takes it away"],
)
async def test_links_lead_somewhere_whatever_the_prefix(
    session_maker: SessionMaker, prefix: str, options: dict[str, Any]
) -> None:
    job = await committed(session_maker)
    async with signed_in(mounted(session_maker, **options), at=prefix) as client:
        for path in ("", "jobs?state=queued", f"jobs/{job.id}", f"jobs/{job.id}/cancel"):
            here = client.base_url.join(path)
            page = await client.get(here)
            assert page.status_code == 200
            links = {part.partition('"')[0] for part in page.text.split('href="')[1:]} - {"#main"}
            links |= {part.partition('"')[0] for part in page.text.split('src="')[1:]}
            assert len(links) > 6
            for link in links:
                found = here.join(link.replace("&amp;", "&"))
                assert found.path.startswith(prefix), link
                assert (await client.get(found)).status_code == 200, link


async def test_what_waits_in_this_process_is_listed_with_its_row_and_its_job(
    full: httpx.AsyncClient, session_maker: SessionMaker, tables: None
) -> None:
    async with session_maker() as session:
        session.add(User(id=7, name="x"))
        job = await enqueue(session, a_task)
        await session.commit()
        waiting = asyncio.create_task(wait_for_row_change(session, User, 7, job=job, timeout=30))

        async def listed() -> bool:
            page = (await full.get("waits")).text
            return "User" in page and "<code>7</code>" in page and f"jobs/{job.id}" in page

        await eventually(listed)
        assert "<b>1</b> for User." in (await full.get("waits")).text
        assert '<dd><a href="./waits">1</a></dd>' in (await full.get("")).text
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert "Nobody waits here" in (await full.get("waits")).text


async def test_a_console_that_is_given_up_is_told_of_nothing_more(session_maker: SessionMaker) -> None:
    gc.collect()
    before = [*observers]
    app = console(session_maker, full_token=FULL)
    assert len(observers) == len(before) + 1
    del app
    gc.collect()
    assert observers == before


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "–"),
        (0.0003, "0.3 ms"),
        (0.412, "412 ms"),
        (2.44, "2.4 s"),
        (190, "3 min 10 s"),
        (7_500, "2 h 5 min"),
        (3_600, "1 h"),
        (273_600, "3 d 4 h"),
        (60 * 86_400, "60 d"),
    ],
)
def test_a_span_is_told_with_the_figures_that_matter(seconds: float | None, words: str) -> None:
    assert span(seconds) == words


def test_an_estimate_says_so() -> None:
    assert count(Number(1_204)) == count(1_204) == "1,204"
    assert count(Number(812_345, exact=False)) == "about 812,000"
