"""A process of the shop is killed, frozen, restarted, slow, or has a wrong clock."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.customer import ELSEWHERE, FINAL, SLACK, answered, slowest, statuses
from tests.faults.faults import at_commit
from tests.serving import eventually

if TYPE_CHECKING:
    from tests.faults.customer import Shop
    from tests.faults.stack import Member, Stack

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROLES = pytest.mark.parametrize("role", ["worker", "leader"])
HOUR = pytest.mark.parametrize("clock", [3600.0, -3600.0], ids=["an hour fast", "an hour slow"])
LOST = {"ConnectError", "ReadError", "RemoteProtocolError"}
"""What a client sees of an API that has gone."""
RESCUES = b"DELETE FROM coord_workers"
DONE = "SELECT count(*) FROM coord_jobs WHERE state = 'done'"
LAST_ATTEMPTS = "SELECT array_agg(attempt) FROM (SELECT attempt FROM coord_jobs ORDER BY created_at DESC LIMIT $1) AS j"


async def in_role(stack: Stack, role: str) -> Member:
    """The worker that leads, or the one that does not."""
    return await (stack.leader() if role == "leader" else stack.follower())


@ROLES
@pytest.mark.parametrize("machine", [False, True], ids=["alone", "with its machine"])
async def test_the_jobs_of_a_worker_that_was_killed_run_elsewhere(
    shop: Shop, stack: Stack, role: str, machine: bool
) -> None:
    victim = await in_role(stack, role)
    async with shop.holding() as held:
        await held.run_by(victim)
        struck = time.monotonic()
        victim.kill(machine=machine)
    assert statuses(await answered(*held.asking)) == {200}
    assert time.monotonic() - struck < ELSEWHERE + SLACK


@ROLES
async def test_the_jobs_of_a_worker_that_is_frozen_run_elsewhere(shop: Shop, stack: Stack, role: str) -> None:
    """And thawed it applies nothing a second time."""
    victim = await in_role(stack, role)
    async with shop.holding() as held:
        await held.run_by(victim)
        struck = time.monotonic()
        victim.freeze()
    assert statuses(await answered(*held.asking)) == {200}
    assert time.monotonic() - struck < ELSEWHERE + SLACK
    victim.thaw()
    assert statuses(await shop.fulfilled(2)) == {200}


@ROLES
async def test_a_worker_that_is_told_to_stop_ends_what_it_runs(shop: Shop, stack: Stack, role: str) -> None:
    """Which uses up no attempt; the other takes what comes meanwhile."""
    victim = await in_role(stack, role)
    async with shop.holding() as held:
        await held.run_by(victim)
        stopping = asyncio.create_task(victim.stop())
    answers = await answered(*held.asking)
    assert statuses(answers) == statuses(await shop.fulfilled()) == {200}
    assert {*await stack.ask(LAST_ATTEMPTS, len(answers) + 1)} == {1}
    await stopping
    await victim.start()


@ROLES
async def test_a_worker_that_stands_still_for_three_seconds_is_not_robbed(shop: Shop, stack: Stack, role: str) -> None:
    victim = await in_role(stack, role)
    async with shop.holding() as held:
        await held.run_by(victim)
        victim.freeze()
    await asyncio.sleep(3)
    victim.thaw()
    answers = await answered(*held.asking)
    assert statuses(answers) == {200}
    assert {*await stack.ask(LAST_ATTEMPTS, len(answers))} == {1}


async def test_what_an_api_was_asked_before_it_was_killed_is_done_once(shop: Shop, stack: Stack) -> None:
    async with shop.holding() as held:
        await held.run_by()
        stack.api.kill()
    await eventually(lambda: not stack.api.is_alive)
    await stack.api.start()
    answers = await answered(*held.asking)
    assert statuses(answers) <= {200, *LOST}


async def test_an_api_that_is_frozen_answers_when_it_goes_on(shop: Shop, stack: Stack) -> None:
    """Workers do not need it: the job is done meanwhile."""
    before = await stack.ask(DONE)
    async with shop.holding() as held:
        await held.run_by()
        stack.api.freeze()

    async def done() -> bool:
        return bool(await stack.ask(DONE) == before + len(held.asking))

    await eventually(done, within=ELSEWHERE)
    stack.api.thaw()
    answers = await answered(*held.asking)
    assert statuses(answers) == {200}


async def test_an_api_that_stands_still_for_three_seconds_answers_so_much_later(shop: Shop, stack: Stack) -> None:
    async with shop.holding() as held:
        await held.run_by()
        stack.api.freeze()
    await asyncio.sleep(3)
    stack.api.thaw()
    thawed = time.monotonic()
    answers = await answered(*held.asking)
    assert statuses(answers) == {200}
    assert time.monotonic() - thawed < 1 + SLACK


async def test_an_api_that_is_told_to_stop_answers_202_at_once(shop: Shop, stack: Stack) -> None:
    async with shop.holding() as held:
        await held.run_by()
        began = time.monotonic()
        await stack.api.stop()
        assert time.monotonic() - began < 2 + SLACK
    await stack.api.start()
    answers = await answered(*held.asking)
    assert {each[0].status for each in answers} == {202}
    assert statuses(answers) <= {200, 202, *LOST}


@HOUR
@pytest.mark.parametrize("role", ["api", "worker", "leader"])
async def test_a_wrong_clock_hurries_nothing_and_delays_nothing(
    shop: Shop, stack: Stack, role: str, clock: float
) -> None:
    """And a leader with one rescues what another has left."""
    member, other = (stack.api, stack.workers[0]) if role == "api" else stack.workers
    if role == "leader":
        await other.stop()
    await member.stop()
    await member.start(clock=clock)
    if role == "leader":
        assert await stack.leader() is member
        await other.start()
        async with shop.holding() as held:
            await held.run_by(other)
            other.kill()
        assert statuses(await answered(*held.asking)) == {200}
    answers = await shop.fulfilled(5)
    assert statuses(answers) == {200}
    assert slowest(answers) < 1 + SLACK
    await member.stop()
    await member.start()


@pytest.mark.parametrize("arrives", [True, False], ids=["which arrives", "which is lost"])
async def test_an_api_that_dies_as_it_sends_commit_is_asked_again_and_it_is_done_once(
    shop: Shop, stack: Stack, arrives: bool
) -> None:
    (order,) = await shop.ordered()
    passed = at_commit(stack.api.postgresql, lambda _wire: stack.api.kill(), arrives=arrives)
    asking = shop.asked(order)
    await asyncio.wait_for(passed.wait(), 10)
    await eventually(lambda: not stack.api.is_alive)
    await stack.api.start()
    (answers,) = await answered(asking)
    assert answers[0].status in LOST
    assert statuses([answers]) <= {200, *LOST}


@pytest.mark.parametrize("arrives", [True, False], ids=["which arrives", "which is lost"])
async def test_a_worker_that_dies_as_it_sends_commit_has_done_it_or_another_does(
    shop: Shop, stack: Stack, arrives: bool
) -> None:
    victim = await stack.follower()
    async with shop.holding() as held:
        await held.run_by(victim)
        port, *_ = (await stack.locking())[victim.name]
        passed = at_commit(victim.postgresql, lambda _wire: victim.kill(), arrives=arrives, port=port)
    await asyncio.wait_for(passed.wait(), 10)
    struck = time.monotonic()
    assert statuses(await answered(*held.asking)) == {200}
    assert time.monotonic() - struck < ELSEWHERE + SLACK


@pytest.mark.parametrize("arrives", [True, False], ids=["which arrives", "which is lost"])
async def test_a_leader_that_dies_as_it_commits_a_rescue_leaves_it_to_the_next(
    shop: Shop, stack: Stack, arrives: bool
) -> None:
    leader, other = stack.workers
    await asyncio.gather(leader.stop(), other.stop())
    await leader.start()  # which has rescued nobody yet, so that the driver still sends statements and not their names
    assert await stack.leader() is leader
    await other.start()
    passed = at_commit(leader.postgresql, lambda _wire: leader.kill(), arrives=arrives, after=RESCUES)
    async with shop.holding() as held:
        await held.run_by(other)
        dead = other.pid
        other.kill(machine=True)
    await asyncio.wait_for(passed.wait(), ELSEWHERE + SLACK)
    assert await eventually(lambda: _is_listed(stack, dead, not arrives))
    await asyncio.gather(leader.start(), other.start())
    started = time.monotonic()
    assert statuses(await answered(*held.asking)) == {200}
    assert time.monotonic() - started < FINAL


async def _is_listed(stack: Stack, pid: int, expected: bool) -> bool:
    return bool(await stack.ask("SELECT count(*) FROM coord_workers WHERE pid = $1", pid)) is expected
