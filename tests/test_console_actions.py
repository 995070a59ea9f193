"""What is done from the console, with a confirmation before it that says to how many."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, update

from coord import JobState, task_options
from coord.jobs.model import jobs
from tests.desk import confirmed, mounted, signed_in
from tests.ledger import a_task, committed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from coord import Job
    from tests.ledger import SessionMaker

pytestmark = pytest.mark.usefixtures("ledger")


@pytest.fixture
async def full(session_maker: SessionMaker) -> AsyncIterator[httpx.AsyncClient]:
    async with signed_in(mounted(session_maker)) as client:
        client.follow_redirects = True
        yield client


async def made(session_maker: SessionMaker, state: JobState, task: Any = a_task) -> Job:
    job = await committed(session_maker, task)
    async with session_maker.begin() as session:
        await session.execute(update(jobs).where(jobs.c.id == job.id).values(state=state, finished_at=func.now()))
    return job


async def states(session_maker: SessionMaker) -> list[JobState]:
    async with session_maker() as session:
        return [*await session.scalars(select(jobs.c.state).order_by(jobs.c.id))]


async def test_a_failed_job_is_run_again(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    job = await made(session_maker, JobState.FAILED)
    asked = (await full.get(f"jobs/{job.id}/retry")).text
    assert "Retry job a_task?" in asked
    assert "It is failed." in asked
    answer = await confirmed(full, f"jobs/{job.id}/retry")
    assert "The job is queued again." in answer.text
    assert "queued</span>" in answer.text
    assert await states(session_maker) == [JobState.QUEUED]


async def test_a_queued_job_is_cancelled(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    job = await committed(session_maker)
    assert "It has not begun, and never will." in (await full.get(f"jobs/{job.id}/cancel")).text
    answer = await confirmed(full, f"jobs/{job.id}/cancel")
    assert "The job is cancelled." in answer.text
    assert await states(session_maker) == [JobState.CANCELLED]


async def test_what_cannot_be_done_is_said_before_and_after(
    full: httpx.AsyncClient, session_maker: SessionMaker
) -> None:
    done = await made(session_maker, JobState.DONE)
    for action in ("retry", "cancel"):
        asked = (await full.get(f"jobs/{done.id}/{action}")).text
        assert f"It is done: there is nothing to {action}." in asked
        assert '<button class="primary"' not in asked
    assert "Nothing was done" in (await confirmed(full, f"jobs/{done.id}/retry")).text
    assert "Too late" in (await confirmed(full, f"jobs/{done.id}/cancel")).text
    task = task_options(a_task, unique_key="one")
    failed = await made(session_maker, JobState.FAILED, task)
    await committed(session_maker, task)
    assert "has the same unique key" in (await confirmed(full, f"jobs/{failed.id}/retry")).text
    assert await states(session_maker) == [JobState.DONE, JobState.FAILED, JobState.QUEUED]


async def test_a_job_that_is_gone_is_not_there(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    job = await committed(session_maker)
    form = (await full.get(f"jobs/{job.id}/cancel")).text
    async with session_maker.begin() as session:
        await session.execute(jobs.delete())
    token = form.rpartition('name="form_token" value="')[2].partition('"')[0]
    for action in ("retry", "cancel"):
        assert (await full.get(f"jobs/{job.id}/{action}")).status_code == 404
        assert (await full.post(f"jobs/{job.id}/{action}", data={"form_token": token})).status_code == 404


async def test_many_are_run_again_by_what_they_are(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    for _ in range(3):
        await made(session_maker, JobState.FAILED, "broken")
    await made(session_maker, JobState.FAILED, "other")
    await made(session_maker, JobState.CANCELLED, "broken")
    asked = (await full.get("bulk/retry?state=failed&task=broken")).text
    assert "Retry 3 failed jobs of the task broken?" in asked
    assert "Retry 3 jobs</button>" in asked
    assert await states(session_maker) == [JobState.FAILED] * 4 + [JobState.CANCELLED]
    answer = await confirmed(full, "bulk/retry?state=failed&task=broken")
    assert "3 queued again." in answer.text
    assert await states(session_maker) == [JobState.QUEUED] * 3 + [JobState.FAILED, JobState.CANCELLED]
    assert "Retry 2 failed and cancelled jobs?" in (await full.get("bulk/retry")).text


async def test_many_are_cancelled_by_what_they_are(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    for queue in ("letters", "letters", "default"):
        await committed(session_maker, task_options("send", queue=queue, delay=timedelta(hours=1)))
    asked = (await full.get("bulk/cancel?queue=letters&age=last-hour")).text
    assert "Cancel 2 queued and running jobs in the queue letters, enqueued in the last hour?" in asked
    answer = await confirmed(full, "bulk/cancel?queue=letters&age=last-hour")
    assert "2 cancelled" in answer.text
    assert await states(session_maker) == [JobState.CANCELLED, JobState.CANCELLED, JobState.QUEUED]
    assert (
        "Cancel 0 queued and running jobs in the queue letters?" in (await full.get("bulk/cancel?queue=letters")).text
    )


async def test_what_is_left_out_of_many_is_said(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    task = task_options(a_task, unique_key="one")
    await made(session_maker, JobState.FAILED, task)
    await made(session_maker, JobState.FAILED, task)
    answer = await confirmed(full, "bulk/retry?state=failed")
    assert "1 queued again. 1 are left, or have an unfinished job with their key." in answer.text
    assert await states(session_maker) == [JobState.FAILED, JobState.QUEUED]


async def test_a_bulk_action_that_fits_no_state_is_refused(full: httpx.AsyncClient) -> None:
    for path in ("bulk/retry?state=done", "bulk/retry?state=queued", "bulk/cancel?state=failed", "bulk/cancel?state=x"):
        assert (await full.get(path)).status_code == 400


async def test_a_queue_is_paused_and_resumed(full: httpx.AsyncClient, session_maker: SessionMaker) -> None:
    await committed(session_maker)
    assert "Pause the queue default?" in (await full.get("queues/pause?queue=default")).text
    answer = await confirmed(full, "queues/pause?queue=default")
    assert "The queue is paused." in answer.text
    assert "paused</span>" in answer.text
    assert "queues/resume?queue=default" in answer.text
    answer = await confirmed(full, "queues/resume?queue=default")
    assert "The queue is resumed." in answer.text
    assert "paused</span>" not in answer.text
    assert (await full.get("queues/pause")).status_code == 400


@pytest.mark.parametrize(
    "query", ["done=<b>", "done=retry&number=<b>", "done=retry&number=1&left=<b>", "done=__class__"]
)
async def test_an_address_cannot_make_the_console_say_what_it_likes(full: httpx.AsyncClient, query: str) -> None:
    assert "<b>" not in (await full.get(f"waits?{query}")).text.partition('<main id="main"')[2].partition("<h1")[0]
