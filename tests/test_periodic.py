"""Periodic tasks: one job for each slot however many workers, across deploys, restarts and changes of the clocks."""

from __future__ import annotations

import asyncio
import itertools
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest

from coord import Periodic, job_transaction, periodic, task_options, worker_settings
from coord.worker.maintenance.pruner import VANISHED, Pruner
from tests.clock import START, Clock
from tests.ledger import a_task
from tests.serving import eventually
from tests.workers import Office, a_state, working

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.spans import Spans

pytestmark = pytest.mark.usefixtures("tables")

BERLIN = ZoneInfo("Europe/Berlin")


def at(day: str, time: str, *, fold: int = 0) -> datetime:
    return datetime.fromisoformat(f"{day}T{time}").replace(tzinfo=BERLIN, fold=fold).astimezone(UTC)


# Which slots there are


def slots(schedule: Periodic, since: datetime, hours: float, step: float = 60.0) -> list[datetime]:
    """What a worker makes that looks every so many seconds, by a clock that is driven."""
    found: list[datetime] = []
    last, now = since, since
    while now < since + timedelta(hours=hours):
        now += timedelta(seconds=step)
        for slot in schedule.due(last, now):
            found.append(slot)
            last = slot
    return found


@pytest.mark.parametrize(
    ("since", "hours", "step"),
    [
        (at("2026-10-25", "01:00"), 4, 1.0),
        (at("2026-10-24", "12:00"), 36, 47.0),
        (at("2026-10-24", "12:00"), 36, 299.0),
    ],
)
def test_a_line_that_names_its_hour_runs_once_on_the_day_whose_hour_comes_twice(
    since: datetime, hours: float, step: float
) -> None:
    schedule = periodic(a_task, "30 2 * * *", timezone="Europe/Berlin")
    found = slots(schedule, since, hours, step)
    assert found == [at("2026-10-25", "02:30", fold=0)]


@pytest.mark.parametrize("fold", [0, 1])
def test_a_worker_that_begins_within_the_double_hour_does_not_run_it_again(fold: int) -> None:
    schedule = periodic(a_task, "30 2 * * *", timezone="Europe/Berlin")
    found = slots(schedule, at("2026-10-25", "02:20", fold=fold), 30)
    first = [] if fold else [at("2026-10-25", "02:30", fold=0)]
    assert found == [*first, at("2026-10-26", "02:30")]


@pytest.mark.parametrize("minutes", ["30", "0,15,30"])
def test_what_lies_in_the_missing_hour_runs_once_right_after_it(minutes: str) -> None:
    schedule = periodic(a_task, f"{minutes} 2 * * *", timezone="Europe/Berlin")
    found = slots(schedule, at("2026-03-29", "00:00"), 20)
    assert found == [at("2026-03-29", "03:00")]


@pytest.mark.parametrize(("day", "hours"), [("2026-10-25", 25), ("2026-03-29", 23), ("2026-06-01", 24)])
def test_an_hourly_line_goes_by_elapsed_time(day: str, hours: int) -> None:
    schedule = periodic(a_task, "0 * * * *", timezone="Europe/Berlin")
    found = slots(schedule, at(day, "00:00") - timedelta(seconds=1), hours)
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert gaps == [timedelta(hours=1)] * (hours - 1)


def test_slots_that_nobody_made_in_time_are_left_out_unless_they_are_to_be_caught_up_with() -> None:
    three_days = START + timedelta(days=3, hours=5)
    days = [START + timedelta(days=day, hours=4) for day in range(4)]
    line = "0 4 * * *"
    assert periodic(a_task, line).due(START, three_days) == []
    assert periodic(a_task, line).due(START, days[-1] + timedelta(minutes=4)) == [days[-1]]
    assert periodic(a_task, line, catch_up=True).due(START, three_days) == [days[-1]]
    assert periodic(a_task, line, overlap=True, catch_up=3).due(START, three_days) == days[1:]
    assert periodic(a_task, line, overlap=True, catch_up=99).due(START, three_days) == days


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("catch_up", "count"), [(True, 1), (1_000, 1_000)])
def test_catching_up_with_every_second_of_a_year_takes_no_look_at_each(catch_up: int, count: int) -> None:
    now = START + timedelta(days=365)
    found = periodic(a_task, "* * * * * *", overlap=True, catch_up=catch_up).due(START, now)
    assert found == [now - timedelta(seconds=back) for back in reversed(range(count))]


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", {}),
        ("61 * * * *", {}),
        ("0 0 30 2 *", {}),
        ("* * * * *", {"timezone": "Europe/Atlantis"}),
        ("* * * * *", {"timezone": "../etc/passwd"}),
        ("* * * * *", {"catch_up": -1}),
        ("* * * * *", {"catch_up": 2}),
        ("* * * * *", {"catch_up": 1.5, "overlap": True}),
    ],
)
def test_what_makes_no_sense_is_refused(line: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cron line|time zone|catch_up"):
        periodic(a_task, line, **options)


def test_settings_refuse_what_they_could_not_keep(session_maker: Any) -> None:
    def made(*schedules: Any) -> Any:
        return worker_settings([a_task], session_maker=session_maker, redis="redis://localhost", periodic=schedules)

    with pytest.raises(ValueError, match="no unique_key"):
        periodic(task_options(a_task, unique_key="k"), "* * * * *")
    with pytest.raises(ValueError, match="not among the functions"):
        made(periodic("unknown", "* * * * *"))
    with pytest.raises(ValueError, match="two schedules are the same"):
        made(periodic(a_task, "* * * * *"), periodic(a_task, "*  * * * *"))
    with pytest.raises(TypeError, match="made by periodic"):
        made(a_task)
    made(periodic(a_task, "* * * * *", 1), periodic(a_task, "* * * * *", 2), periodic(a_task, "*/2 * * * *"))


# By a clock in PostgreSQL that the test drives


async def made(observer: Connection) -> list[datetime]:
    """The slots of the jobs, which their ids say."""
    rows = await observer.fetch("SELECT id FROM coord_jobs ORDER BY id")
    return [datetime.fromtimestamp((row["id"].int >> 80) / 1000, UTC) for row in rows]


async def test_each_slot_has_one_job_however_many_workers_look_and_however_late(
    clock: Clock, observer: Connection
) -> None:
    schedule = periodic(task_options(a_task, priority=3), "*/10 * * * *", "x", overlap=True)
    tickers = [clock.ticker(schedule) for _ in range(5)]
    for ticker in tickers:
        await ticker.round()
    for _ in range(6):
        await clock.go_on(minutes=5)
        await asyncio.gather(*(ticker.round() for ticker in tickers))
    late = clock.ticker(schedule)
    await late.round()
    assert await made(observer) == [START + timedelta(minutes=10 * number) for number in (1, 2, 3)]
    row = await observer.fetchrow("SELECT DISTINCT task, queue, arguments::text, priority FROM coord_jobs")
    assert tuple(row) == ("a_task", "default", '[["x"],{}]', 3)


async def test_only_the_worker_that_makes_a_slots_job_has_its_span(
    clock: Clock, observer: Connection, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three that have all seen that the slot is due."""
    tickers = [clock.ticker(periodic(a_task, "* * * * *")) for _ in range(3)]
    for ticker in tickers:
        await ticker.round()
    await clock.go_on(minutes=1)
    all_have_seen, due = threading.Barrier(len(tickers), timeout=10), Periodic.due

    def seen(schedule: Periodic, last: datetime, now: datetime) -> Any:
        all_have_seen.wait()
        return due(schedule, last, now)

    monkeypatch.setattr(Periodic, "due", seen)
    await asyncio.gather(*(ticker.round() for ticker in tickers))
    attributes = spans.one("send a_task").attributes
    assert attributes is not None
    assert attributes["messaging.message.id"] == str(await observer.fetchval("SELECT id FROM coord_jobs"))


async def test_a_new_schedule_begins_with_its_next_slot(clock: Clock, observer: Connection) -> None:
    schedule = periodic(a_task, "*/10 * * * *", catch_up=True)
    seconds = await clock.ticker(schedule).round()
    assert await made(observer) == []
    assert seconds == 30.0
    await clock.go_on(minutes=9, seconds=55)
    assert await clock.ticker(schedule).round() == pytest.approx(5, abs=0.1)


async def test_a_slot_is_skipped_while_the_last_job_is_unfinished_unless_they_may_overlap(
    clock: Clock, observer: Connection
) -> None:
    apart, beside = periodic(a_task, "* * * * *", 1), periodic(a_task, "* * * * *", 2, overlap=True)
    ticker = clock.ticker(apart, beside)
    await ticker.round()
    for number in range(3):
        await clock.go_on(minutes=1)
        await ticker.round()
        if number == 1:
            await observer.execute("UPDATE coord_jobs SET state = 'done' WHERE arguments::text = '[[1],{}]'")
    counts = await observer.fetch("SELECT arguments::text AS given, count(*) FROM coord_jobs GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in counts] == [("[[1],{}]", 2), ("[[2],{}]", 3)]


async def test_what_was_missed_while_nobody_worked_is_caught_up_with_once(clock: Clock, observer: Connection) -> None:
    given = [
        periodic(a_task, "0 * * * *", 0),
        periodic(a_task, "0 * * * *", 1, catch_up=True),
        periodic(a_task, "0 * * * *", 3, overlap=True, catch_up=3),
    ]
    await clock.ticker(*given).round()
    await clock.go_on(days=2, minutes=30)
    for _ in range(2):
        await asyncio.gather(clock.ticker(*given).round(), clock.ticker(*given).round())
    counts = await observer.fetch("SELECT arguments::text AS given, count(*) FROM coord_jobs GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in counts] == [("[[1],{}]", 1), ("[[3],{}]", 3)]


async def test_a_schedule_that_has_much_to_catch_up_with_keeps_no_other_one_waiting(
    clock: Clock, observer: Connection
) -> None:
    seconds = periodic(a_task, "* * * * * *", "seconds", overlap=True, catch_up=250)
    other = periodic(a_task, "0 0 * * *", "other")
    ticker = clock.ticker(seconds, other)
    await ticker.round()
    await clock.go_on(days=7)
    made = "SELECT count(*) FROM coord_jobs GROUP BY arguments::text ORDER BY arguments::text"
    found = []
    for _ in range(4):
        is_behind = not await ticker.round()
        found.append((is_behind, *[row["count"] for row in await observer.fetch(made)]))
    assert found == [(True, 1, 100), (True, 1, 200), (False, 1, 250), (False, 1, 250)]


async def test_a_schedule_that_is_in_no_code_makes_nothing_and_leaves_the_ledger(
    clock: Clock, engine: AsyncEngine, observer: Connection
) -> None:
    old, new = periodic(a_task, "* * * * *", "old"), periodic(a_task, "* * * * *", "new")
    await clock.ticker(old, new).round()
    deployed = clock.ticker(new)
    await clock.go_on(minutes=1)
    await deployed.round()
    assert [row["arguments"] for row in await observer.fetch("SELECT arguments FROM coord_jobs")] == ['[["new"],{}]']
    await observer.execute("UPDATE coord_schedules SET seen_at = now() - $1::interval", VANISHED)
    await clock.ticker(new).round()
    await Pruner(a_state(clock.engine, keep=3600)).prune()
    assert [row["name"] for row in await observer.fetch("SELECT name FROM coord_schedules")] == [new.name("default")]


async def test_a_slot_whose_commit_failed_is_made_by_the_next_who_looks(clock: Clock, observer: Connection) -> None:
    schedule = periodic(a_task, "* * * * *")
    ticker = clock.ticker(schedule)
    await ticker.round()
    await clock.go_on(minutes=1)
    await observer.execute("ALTER TABLE coord_jobs ADD CONSTRAINT refused CHECK (task <> 'a_task') NOT VALID")
    try:
        with pytest.raises(Exception, match="refused"):
            await ticker.round()
    finally:
        await observer.execute("ALTER TABLE coord_jobs DROP CONSTRAINT refused")
    await clock.ticker(schedule).round()
    assert await made(observer) == [START + timedelta(minutes=1)]


async def test_a_ledger_that_has_forgotten_its_schedules_makes_no_slot_twice(
    clock: Clock, observer: Connection
) -> None:
    schedule = periodic(a_task, "* * * * *")
    ticker = clock.ticker(schedule)
    await ticker.round()
    await clock.go_on(minutes=1)
    await ticker.round()
    await observer.execute("UPDATE coord_schedules SET slot = slot - interval '1 minute', job_id = NULL")
    await ticker.round()
    assert await made(observer) == [START + timedelta(minutes=1)]


# With workers


async def test_workers_run_each_slot_once_and_tell_the_task_which_it_is(office: Office, observer: Connection) -> None:
    seen: list[datetime] = []

    async def task(ctx: dict[str, Any], name: str) -> None:
        async with job_transaction(ctx):
            seen.append(ctx["enqueue_time"])

    given = [periodic(task, "* * * * * *", name="x", overlap=True)]
    async with working(office, [task], periodic=given), working(office, [task], periodic=given):
        await eventually(lambda: len(seen) >= 2, within=15)
    async with working(office, [task], periodic=given):  # after a restart
        before = len(seen)
        await eventually(lambda: len(seen) >= before + 2, within=15)
    assert len(seen) == len({*seen})
    assert {moment.microsecond for moment in seen} == {0}
    count = len(seen)
    async with working(office, [task]):  # after a deploy that has it no more
        last = await observer.fetchval("SELECT max(slot) FROM coord_schedules")
        await asyncio.sleep(2)
        assert await observer.fetchval("SELECT max(slot) FROM coord_schedules") == last
    assert len(seen) - count <= 2
