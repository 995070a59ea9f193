"""The system's Chromium, installed where it is missing, and a page of it that notes what it should not have done."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request

LOCK = Path(tempfile.gettempdir()) / "coord-chromium.lock"
INSTALL_SECONDS = 400
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
NEEDED = "the console's tests need Chromium, Debian's package `chromium`"


def program() -> Path:
    """Installed by apt-get if it is not there, by one of the suite's processes while the others wait."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = shutil.which("chromium")
        if found is None:
            _install()
            found = shutil.which("chromium")
    if found is None:
        pytest.fail(f"{NEEDED}, which apt-get has installed elsewhere than on PATH")
    return Path(found)


def _install() -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.fail(f"{NEEDED}: install it, or run them as root where there is apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        ended = subprocess.run(
            ["apt-get", "-qq", *command], check=False, env=environment, capture_output=True, timeout=INSTALL_SECONDS
        )
        if ended.returncode != 0:
            pytest.fail(f"{NEEDED}, and apt-get {command[0]} has failed: {ended.stderr.decode()[-500:]}")


class Watched:
    """A browser's page, and what went wrong in it."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        """Requests to other hosts."""
        self._origin = urlsplit(origin).netloc
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} at {message.location}")

    def _on_request(self, request: Request) -> None:
        if urlsplit(request.url).netloc != self._origin:
            self.elsewhere.append(request.url)


@contextlib.asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program(), args=[*OPTIONS], chromium_sandbox=False)
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def browsing(browser: Browser, **options: Any) -> AsyncIterator[BrowserContext]:
    """A page of its own, whose profile is empty."""
    context = await browser.new_context(**options)
    try:
        await context.new_page()
        yield context
    finally:
        await context.close()
