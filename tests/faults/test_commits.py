"""A process loses its connection as a COMMIT passes. Quick, and so `make test` has these cells as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.customer import answered, statuses
from tests.faults.faults import at_commit

if TYPE_CHECKING:
    from tests.faults.customer import Shop
    from tests.faults.stack import Stack

pytestmark = pytest.mark.slow

ARRIVES = pytest.mark.parametrize("arrives", [True, False], ids=["which arrives", "which is lost"])


@ARRIVES
async def test_an_api_cut_off_as_it_sends_commit_says_503_and_asked_again_it_is_done_once(
    shop: Shop, stack: Stack, arrives: bool
) -> None:
    (order,) = await shop.ordered()
    passed = at_commit(stack.api.postgresql, lambda wire: wire.cut(), arrives=arrives)
    (answers,) = await answered(shop.asked(order))
    assert passed.is_set()
    assert [answer.status for answer in answers] == [503, 200]
    assert answers[0].kind == "database-away"


@ARRIVES
@pytest.mark.parametrize("role", ["worker", "leader"])
async def test_a_worker_cut_off_as_it_sends_commit_tries_again_and_it_is_done_once(
    shop: Shop, stack: Stack, role: str, arrives: bool
) -> None:
    victim = await (stack.leader() if role == "leader" else stack.follower())
    async with shop.holding() as held:
        await held.run_by(victim)
        port, *_ = (await stack.locking())[victim.name]
        passed = at_commit(victim.postgresql, lambda wire: wire.cut(), arrives=arrives, port=port)
    assert statuses(await answered(*held.asking)) == {200}
    assert passed.is_set()
