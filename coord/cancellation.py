"""Statements and cleanup that come to their end although an anyio scope cancels every await of the caller.

`task.cancel()` raises once; a cancel scope of anyio (Starlette's `BaseHTTPMiddleware`, a streaming response whose
client left) raises at every await until the scope is left. That also strikes the awaits with which a driver tells
PostgreSQL to stop: the client sees a cancelled query, the server goes on with it and keeps its place in the lock queue.
Work in a task of its own is outside the caller's scopes and is cancelled once, if at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import anyio

from coord.errors import message_of

T = TypeVar("T")

logger = logging.getLogger("coord.engine")

CLEANUP_TIMEOUT_SECONDS = 10.0
"""Seconds after which cleanup against a server that does not answer is given up."""
STOP_TIMEOUT_SECONDS = 0.1
"""Seconds for work to stop whose time is up: its server may well be gone."""


def times_cancelled() -> int:
    """How often somebody has cancelled the task that runs this."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


async def interruptible(
    work: Coroutine[Any, Any, T],
    *,
    limit: float | None = None,
    give_up: Callable[[], None] | None = None,
    grace: float = 0,
) -> T:
    """Await `work`; a cancelled caller cancels it once, as `task.cancel()` would, and sees it end before leaving.

    Only after `grace` seconds, in which it may end by itself. `TimeoutError` after `limit` seconds; the work is then
    cancelled and hardly waited for: its server may be gone. `give_up` is called before that.
    """
    ended = asyncio.get_running_loop().create_future()  # a cancellation of the caller's ends this, and not the work
    task = asyncio.create_task(_telling(work, ended))
    task.add_done_callback(partial(_close, work, ended))
    timer = None if limit is None else asyncio.get_running_loop().call_later(limit, _tell, ended)
    try:
        await ended
    except asyncio.CancelledError:
        try:
            await _seen_to_end(task, grace)
        finally:
            task.cancel()
            await _seen_to_end(task)
        raise
    finally:
        if timer is not None:
            timer.cancel()
    if not task.done():
        if give_up is not None:
            give_up()
        task.cancel()
        await _seen_to_end(task, STOP_TIMEOUT_SECONDS)
        raise TimeoutError
    try:
        return task.result()
    finally:
        del task  # an error would refer to itself, by its traceback and this frame


async def _seen_to_end(task: asyncio.Task[Any], limit: float | None = CLEANUP_TIMEOUT_SECONDS) -> None:
    """Wait for it whatever cancels the caller meanwhile: what it works on is the caller's, to use next or to give up.

    A second deadline, a server's forced stop: cancellations come in twos.
    """
    loop = asyncio.get_running_loop()
    end = None if limit is None else loop.time() + limit
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done() and (end is None or loop.time() < end):
            try:
                await asyncio.wait([task], timeout=None if end is None else end - loop.time())
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end whatever cancels the caller meanwhile, for at most `CLEANUP_TIMEOUT_SECONDS`."""
    task = asyncio.create_task(_limited(work))
    task.add_done_callback(_retrieve)
    task.add_done_callback(lambda _: work.close())  # which has not begun if the loop ends just now
    await _seen_to_end(task, None)
    try:
        return task.result()
    finally:
        del task


async def cleaned_up(work: Coroutine[Any, Any, T]) -> T | None:
    """The same, but for its own errors, which are logged: they do not replace the outcome before them.

    It may be an error that is worth another attempt, or a commit. A cancellation must not be swallowed.
    """
    try:
        return await uninterrupted(work)
    except Exception as error:  # noqa: BLE001 - see above
        logger.warning("Cleaning up has failed: %s", message_of(error))
        return None


@asynccontextmanager
async def settled(block: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """`async with block`, except that its exit comes to an end under any cancellation."""
    value = await block.__aenter__()
    async with leaving(block):
        yield value


@asynccontextmanager
async def leaving(block: AbstractAsyncContextManager[Any]) -> AsyncIterator[None]:
    """The same of a block that was entered before."""
    try:
        yield
    except BaseException as error:
        if not await cleaned_up(block.__aexit__(type(error), error, error.__traceback__)):
            raise
    else:
        await interruptible(block.__aexit__(None, None, None))


async def _limited(work: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(CLEANUP_TIMEOUT_SECONDS):
        return await work


async def _telling(work: Coroutine[Any, Any, T], ended: asyncio.Future[None]) -> T:
    """In the task's last step, an iteration of a busy loop before its callbacks: the caller may hold a lock by now."""
    try:
        return await work
    finally:
        _tell(ended)


def _tell(ended: asyncio.Future[None]) -> None:
    """Of its end, or of the end of its time."""
    if not ended.done():
        ended.set_result(None)


def _close(work: Coroutine[Any, Any, Any], ended: asyncio.Future[None], task: asyncio.Task[Any]) -> None:
    """Work has not begun, and has told nobody, if its task was cancelled before its first step."""
    work.close()
    _retrieve(task)
    _tell(ended)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from logging an error that a cancelled caller no longer waits for."""
    if not task.cancelled():
        task.exception()
