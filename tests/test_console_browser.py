"""The console in a real Chromium: live, without an error and without a request to another host."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import expect

from coord import Job, JobState, wait_for_row_change
from tests.chromium import Watched, browsing, launched
from tests.desk import FULL, READ, mounted
from tests.serving import served
from tests.workers import process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg
    from playwright.async_api import Browser, Page

    from tests.workers import Notes, Office

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ledger")]
"""Chromium may have to be installed first."""

WITHIN_MS = 20_000


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with launched() as browser:
        yield browser


async def sign_in(page: Page, token: str) -> None:
    await page.get_by_label("Token").fill(token)
    await page.get_by_role("button", name="Sign in").click()


async def act(page: Page, action: str, button: str) -> None:
    """By its link, and the confirmation page."""
    await page.get_by_role("link", name=re.compile(f"^{action}")).first.click()
    await expect(page.get_by_role("heading", level=1)).to_contain_text("?")
    await page.get_by_role("button", name=button).click()


async def failed(office: Office, notes: Notes) -> Job:
    job = await office.enqueue("fail", "at once")
    notes.let("at once")
    assert (await office.final(job, within=20)).state is JobState.FAILED
    return job


async def test_who_is_on_call_sees_what_waits_for_what_and_acts(
    browser: Browser, office: Office, notes: Notes, tables: None, observer: asyncpg.Connection
) -> None:
    expect.set_options(timeout=WITHIN_MS)
    async with (
        process(office, notes, heartbeat_process=False, COORD_TEST_GRACE="5"),
        served(mounted(office.session_maker)) as client,
        browsing(browser, viewport={"width": 1280, "height": 900}) as context,
    ):
        page = context.pages[0]
        watched = Watched(page, str(client.base_url))
        url = f"{client.base_url}/console"
        await page.goto(f"{url}/jobs")
        await sign_in_wrongly(page, watched)
        await sign_in(page, FULL)
        await expect(page).to_have_url(f"{url}/jobs")
        await expect(page.locator("#pulse")).to_have_attribute("data-state", "live")

        running = await office.enqueue("hold_transaction", "run")
        await notes.say(running, "entered")
        row = page.locator("tr", has=page.locator(f'a[href$="jobs/{running.id}"]'))
        await expect(row).to_contain_text("running")  # by the stream: the page was not loaded again
        await a_blocked_lock(page, url, office, notes)
        await page.goto(f"{url}/jobs/{running.id}")
        await act(page, "Cancel", "Cancel this job")
        await expect(page.get_by_role("status").first).to_contain_text("its worker has been told")
        await expect(page.locator("#live")).to_contain_text("cancelled")
        await actions(page, url, office, notes)
        assert watched.errors == []
        assert watched.elsewhere == []


async def sign_in_wrongly(page: Page, watched: Watched) -> None:
    await expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
    await sign_in(page, "not a token of this")
    await expect(page.get_by_role("alert")).to_contain_text("not a token")
    # Chromium's console has a line for each page that is 403.
    assert [error for error in watched.errors if "403" not in error] == []
    watched.errors.clear()


async def a_blocked_lock(page: Page, url: str, office: Office, notes: Notes) -> None:
    await page.goto(f"{url}/locks")
    holder = await office.enqueue("hold_lock", "go")
    await notes.say(holder, "locked")
    waiter = await office.enqueue("hold_lock", "go")
    await notes.say(waiter, "starts")
    above, below = page.locator(".tree > li > .node"), page.locator(".tree > li > ul > li > .node")
    await expect(below.locator(f'a[href$="jobs/{waiter.id}"]')).to_have_text("hold_lock")
    await expect(below.locator(f'a[href$="jobs/{holder.id}"]')).to_have_text("hold_lock")
    await expect(below).to_contain_text(re.compile(r"waits [\d.]+ m?s for users SHARE ROW EXCLUSIVE behind hold_lock"))
    await expect(above.locator(f'a[href$="jobs/{holder.id}"]').first).to_have_text("hold_lock")
    await expect(above).to_contain_text("holds users SHARE ROW EXCLUSIVE")
    await page.get_by_role("link", name="hold_lock").nth(1).click()
    await expect(page.locator(".alert")).to_contain_text("behind hold_lock")
    notes.let("go")
    await expect(page.locator("#live")).to_contain_text("done")
    await office.final(holder)
    await page.goto(f"{url}/locks")
    await expect(page.locator("#live")).to_contain_text("Nobody holds a strong lock")
    await expect(page.locator("tr", has=page.locator(f'a[href$="jobs/{waiter.id}"]'))).to_contain_text("over")


async def actions(page: Page, url: str, office: Office, notes: Notes) -> None:
    job = await failed(office, notes)
    await page.goto(f"{url}/jobs/{job.id}")
    await page.get_by_text("Traceback", exact=True).click()
    await expect(page.locator("details pre")).to_contain_text("ValueError: at once")
    await act(page, "Retry", "Retry this job")
    await expect(page.get_by_role("status").first).to_contain_text("queued again")
    await expect(page.locator("#live")).to_contain_text("Attempt 2: failed")
    await page.goto(f"{url}/jobs?state=failed")
    await act(page, "Retry all", "Retry this job")
    await expect(page.get_by_role("status").first).to_contain_text("1 queued again")
    await page.goto(f"{url}/")
    await act(page, "Pause", "Pause default")
    await expect(page.locator("#live")).to_contain_text("paused")
    await act(page, "Resume", "Resume default")
    await expect(page.locator("#live")).not_to_contain_text("paused")
    assert (await office.final(job, within=20)).attempt == 3


async def test_a_wait_is_seen_while_it_lasts_and_a_reader_is_offered_nothing(
    browser: Browser, office: Office, notes: Notes, tables: None
) -> None:
    expect.set_options(timeout=WITHIN_MS)
    async with (
        process(office, notes, heartbeat_process=False),
        served(mounted(office.session_maker)) as client,
        browsing(browser, viewport={"width": 390, "height": 844}, color_scheme="dark") as context,
    ):
        page = context.pages[0]
        url = f"{client.base_url}/console"
        await page.goto(f"{url}/waits")
        watched = Watched(page, str(client.base_url))
        await sign_in(page, READ)
        await expect(page.locator("#live")).to_contain_text("Nobody waits here")
        job = await office.enqueue("hold", "end")
        await notes.say(job, "starts")
        async with office.session_maker() as session:
            waiting = asyncio.create_task(wait_for_row_change(session, Job, job.id, job=job, timeout=60))
            await expect(page.locator("#live")).to_contain_text("Job that may end it")
            notes.let("end")
            ended = await waiting
        assert ended.state is JobState.DONE
        await expect(page.locator("#live")).to_contain_text("Nobody waits here")
        for path in ("", "locks", "jobs", f"jobs/{job.id}"):
            await page.goto(f"{url}/{path}")
            await expect(page.locator("#pulse")).to_have_attribute("data-state", "live")
            wide = await page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{path} is {wide} pixels wide"
            assert await page.locator(".act").count() == 0
        await expect(page.locator("#live")).to_contain_text("shown to the full token alone")
        assert (watched.errors, watched.elsewhere) == ([], [])


async def test_the_pages_can_be_read_by_keyboard_and_without_a_script(browser: Browser, office: Office) -> None:
    expect.set_options(timeout=WITHIN_MS)
    await office.enqueue("quick")
    async with served(mounted(office.session_maker)) as client:
        url = f"{client.base_url}/console"
        size = {"width": 1280, "height": 900}
        async with browsing(browser, viewport=size, java_script_enabled=False) as context:
            page = context.pages[0]
            await page.goto(f"{url}/jobs")
            await sign_in(page, FULL)
            await expect(page.locator("#live")).to_contain_text("quick")
            await expect(page.get_by_role("link", name="Reload")).to_be_visible()
            await page.keyboard.press("Tab")
            await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
            await page.keyboard.press("Enter")
            await page.get_by_role("link", name="quick").click()
            await act(page, "Cancel", "Cancel this job")
            await expect(page.get_by_role("status").first).to_contain_text("The job is cancelled.")
