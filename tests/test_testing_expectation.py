"""`assert_enqueued` and `refute_enqueued`: what matches, and what the message shows if nothing does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from arq.worker import func

from coord import enqueue, task_options
from coord.testing import assert_enqueued, perform, refute_enqueued

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


async def _invoice(ctx: dict[str, Any], order_id: int, *notes: str, urgent: bool = False, **more: Any) -> None:
    """With every kind of parameter."""


invoice: Any = func(_invoice, name="invoice")


async def letter(ctx: dict[str, Any], text: str) -> None:
    """Another."""


async def test_the_job_that_is_found_is_returned(coord_session: AsyncSession) -> None:
    job = await enqueue(coord_session, invoice, 7)
    await enqueue(coord_session, invoice, 8)
    found = await assert_enqueued(coord_session, invoice, 7)
    assert (found.id, found.task, found.arguments) == (job.id, "invoice", [[7], {}])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((7,), {}),
        ((), {"order_id": 7}),
        ((7, "first"), {}),
        ((7, "first", "second"), {}),
        ((), {"urgent": False}),
        ((7,), {"colour": "red"}),
        ((), {"size": {"x": [1, 2.5, None]}}),
    ],
)
async def test_arguments_match_as_far_as_they_are_given_however_they_were_passed(
    coord_session: AsyncSession, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    await enqueue(coord_session, invoice, 7, "first", "second", colour="red", size={"x": [1, 2.5, None]})
    await assert_enqueued(coord_session, invoice, *args, **kwargs)


async def counted(*args: Any) -> None:
    """As a decorator leaves a task, whose context is then the first of these."""


async def test_of_a_task_that_takes_its_context_among_others_the_arguments_are_compared(
    coord_session: AsyncSession,
) -> None:
    await enqueue(coord_session, counted, 7, "first")
    await assert_enqueued(coord_session, counted, 7)
    await refute_enqueued(coord_session, counted, 8)
    await refute_enqueued(coord_session, counted, 7, "second")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((8,), {}),
        ((7.0,), {}),
        ((7, "second"), {}),
        ((7, "first", "second", "third"), {}),
        ((), {"urgent": True}),
        ((), {"colour": "blue"}),
        ((), {"weight": None}),
    ],
)
async def test_other_arguments_do_not_match(
    coord_session: AsyncSession, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    await enqueue(coord_session, invoice, 7, "first", "second", colour="red")
    await refute_enqueued(coord_session, invoice, *args, **kwargs)


async def test_options_match_as_far_as_they_are_given(coord_session: AsyncSession) -> None:
    options: dict[str, Any] = {
        "queue": "mail",
        "priority": 5,
        "unique_key": "order 7",
        "one_at_a_time": "orders",
        "max_attempts": 3,
        "timeout": 9.5,
        "delay": 3600,
    }
    await enqueue(coord_session, task_options(invoice, **options), 7)
    await assert_enqueued(coord_session, task_options(invoice, **options), 7)
    others = {"queue": "post", "priority": 6, "unique_key": "7", "one_at_a_time": "7", "max_attempts": 4, "timeout": 9}
    wrong: dict[str, Any] = {**others, "delay": 3601}
    for name, value in wrong.items():
        await assert_enqueued(coord_session, task_options(invoice, **{name: options[name]}))
        await refute_enqueued(coord_session, task_options(invoice, **{name: value}))


async def test_the_time_at_which_it_is_due_is_matched_by_a_window(coord_session: AsyncSession) -> None:
    now = datetime.now(UTC)
    moment = now + timedelta(hours=1)
    await enqueue(coord_session, task_options(invoice, delay=moment), 7)
    await assert_enqueued(coord_session, task_options(invoice, delay=moment))
    windows: tuple[Any, ...] = (
        (3500, 3601),
        (timedelta(minutes=50), None),
        (None, moment),
        (now, now + timedelta(hours=2)),
    )
    for window in windows:
        await assert_enqueued(coord_session, invoice, 7, scheduled=window)
    windows = ((None, 3500), (moment + timedelta(seconds=1), None), (now, moment - timedelta(seconds=1)))
    for window in windows:
        await refute_enqueued(coord_session, invoice, 7, scheduled=window)


async def test_a_time_that_has_passed_is_matched_as_it_was_given(coord_session: AsyncSession) -> None:
    """The job is due when it was enqueued."""
    moment = datetime.now(UTC) - timedelta(hours=1)
    await enqueue(coord_session, task_options(invoice, delay=moment), 7)
    await assert_enqueued(coord_session, task_options(invoice, delay=moment))
    await refute_enqueued(coord_session, task_options(invoice, delay=datetime.now(UTC) + timedelta(hours=1)))


async def test_a_task_may_be_named_or_arqs_function(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, "elsewhere", 7, 8, urgent=True)
    await assert_enqueued(coord_session, "elsewhere", 7)
    await assert_enqueued(coord_session, "elsewhere", urgent=True)
    await refute_enqueued(coord_session, "elsewhere", 8)
    await enqueue(coord_session, func(letter, name="post"), "hello")
    await assert_enqueued(coord_session, func(letter, name="post"), text="hello")


async def test_a_job_that_has_run_is_enqueued_no_more(coord_session: AsyncSession) -> None:
    await perform(letter, "hello", session=coord_session)
    await refute_enqueued(coord_session, letter)


async def message(session: AsyncSession, check: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        await check(session, *args, **kwargs)
    return f"{caught.value}\n"


async def test_the_message_shows_what_was_asked_and_what_is_there(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, task_options(letter, queue="mail", delay=7200, priority=5), "x" * 78)
    await enqueue(coord_session, task_options(invoice, unique_key="order 8"), 8, urgent=True)
    await enqueue(coord_session, "weigh")
    asked = task_options(invoice, unique_key="order 7")
    said = await message(coord_session, assert_enqueued, asked, order_id=7)
    assert said == dedent("""\
        No such job is queued:

            task     arguments   unique_key
            invoice  order_id=7  order 7

        3 jobs are queued:

            task     arguments                                           queue    priority  unique_key  due
            invoice  8, urgent=true                                      default            order 8     now
            letter   "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…  mail     5                     in 7,200 s
            weigh    none                                                default                        now
        """)


async def test_the_message_shows_the_window_that_was_asked_for(coord_session: AsyncSession) -> None:
    said = await message(coord_session, assert_enqueued, letter, scheduled=(60, datetime(2030, 1, 2, tzinfo=UTC)))
    assert said == dedent("""\
        No such job is queued:

            task    arguments  due
            letter  any        from in 60 s until 2030-01-02 00:00:00 UTC

        Nothing is queued.
        """)


async def test_the_message_of_a_refutation_shows_the_jobs(coord_session: AsyncSession) -> None:
    await enqueue(coord_session, letter, "hello")
    await enqueue(coord_session, invoice, 7)
    assert await message(coord_session, refute_enqueued, letter, "hello") == dedent("""\
        Such a job is queued:

            task    arguments
            letter  "hello"

        1 job is queued:

            task    arguments  queue    due
            letter  "hello"    default  now
        """)


async def test_a_long_queue_is_cut(coord_session: AsyncSession) -> None:
    for number in range(23):
        await enqueue(coord_session, letter, f"{number}")
    said = await message(coord_session, assert_enqueued, invoice)
    assert said.endswith("    … and 3 more\n")
    assert said.count("letter") == 20


@pytest.mark.parametrize(
    ("task", "args", "options", "error", "says"),
    [
        (letter, ("a", "b"), {}, TypeError, "too many positional arguments"),
        (letter, (), {"colour": "red"}, TypeError, "unexpected keyword argument 'colour'"),
        (letter, (), {"colour": "red"}, TypeError, r"letter\(ctx, .*\) does not take these arguments"),
        (letter, (("a", "tuple"),), {}, TypeError, "JSON"),
        (letter, (), {"scheduled": 3600}, TypeError, "from when to when"),
        (letter, (), {"scheduled": (-1, None)}, ValueError, "scheduled is a finite number"),
        (letter, (), {"scheduled": (datetime(2030, 1, 1), None)}, ValueError, "no time zone"),
        (task_options(letter, delay=3), (), {"scheduled": (1, 5)}, ValueError, "not both"),
        (3, (), {}, TypeError, "task is a function with a name"),
    ],
)
@pytest.mark.parametrize("check", [assert_enqueued, refute_enqueued])
async def test_what_makes_no_sense_is_refused(
    coord_session: AsyncSession,
    check: Any,
    task: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        await check(coord_session, task, *args, **options)
