"""Waits under random interleavings of everything that can happen to them: none misses a change, none is late."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy import select, text

import coord.waiting.watcher
from coord import Coordinator, WaitTimeoutError, wait_for_row_change, watch_row
from coord.notify.subscriber import Subscriber
from coord.waiting.reader import Reader
from tests.models import Account, User
from tests.serving import all_given_back, eventually
from tests.waits import waiters

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

INTERVAL = 0.15
SLACK = 0.35
"""Seconds that two busy cores may take for what takes milliseconds; held reads are counted apart."""
ROWS = 2

rows = st.integers(1, ROWS)
kinds = st.sampled_from(["loaded", "since", "until", "nothing"])
actions = st.one_of(
    st.tuples(
        st.just("wait"), rows, st.sampled_from(["loaded", "since", "until", "nothing"]), st.sampled_from([0.2, 0.6])
    ),
    st.tuples(st.just("commit"), rows),
    st.tuples(st.just("raw"), rows),
    st.tuples(st.just("lose the next hint")),
    st.tuples(st.just("reconnect")),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("hold"), st.sampled_from(["before", "after"])),
    st.tuples(st.just("release")),
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.0, 0.002, 0.03, 0.1])),
)


@dataclass
class Wait:
    task: asyncio.Task[Any]
    row: int
    seen: int | None
    """The version that was known; None when the wait starts from the row as it finds it."""
    current: int
    """The row's version when the call began."""
    began: float
    deadline: float
    ended: float = 0.0


@dataclass
class World:
    """The rows, the waits, and what stands between them."""

    session_maker: SessionMaker
    redis: Redis
    waits: list[Wait] = field(default_factory=list)
    sessions: list[AsyncSession] = field(default_factory=list)
    changes: list[tuple[float, int, int]] = field(default_factory=list)
    """When a commit had returned, the row, its version."""
    versions: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(1, ROWS + 1), 1))
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    lost: int = 0
    held: float = 0.0

    def __post_init__(self) -> None:
        for place in ("before", "after"):
            self.gates[place] = asyncio.Event()
            self.gates[place].set()

    async def do(self, action: tuple[Any, ...]) -> None:
        match action:
            case ("wait", row, kind, timeout):
                await self.wait(row, kind, timeout)
            case ("commit" | "raw" as how, row):
                await self.change(row, how)
            case ("lose the next hint",):
                self.lost += 1
            case ("reconnect",):
                await self.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
            case ("cancel", n) if n < len(self.waits):
                self.waits[n].task.cancel()
            case ("hold", place):
                self.gates[place].clear()
            case ("release",):
                self.release()
            case ("pass", seconds):
                await asyncio.sleep(seconds)

    def release(self) -> None:
        for gate in self.gates.values():
            gate.set()

    async def wait(self, row: int, kind: str, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        session = self.session_maker()
        self.sessions.append(session)
        version = self.versions[row]
        options: dict[str, Any] = {}
        loaded = None
        if kind == "loaded":
            loaded = await session.scalar(select(Account).where(Account.number == row))
        elif kind == "since":
            options["since"] = {"version": version}
        elif kind == "until":
            options["until"] = lambda account: account.version > version

        async def run() -> Any:
            try:
                return (
                    await wait_for_row_change(
                        session,
                        Account,
                        ("eu", row),
                        interval=INTERVAL,
                        timeout=timeout,
                        columns=["version"],
                        **options,
                    )
                ).version
            finally:
                wait.ended = loop.time()
                assert loaded is None or loaded.number == row

        seen = None if kind == "nothing" else version
        task = asyncio.create_task(run())
        wait = Wait(task, row, seen, version, loop.time(), loop.time() + timeout)
        self.waits.append(wait)

    async def change(self, row: int, how: str) -> None:
        version = self.versions[row] + 1
        async with self.session_maker() as session:
            if how == "commit":
                account = await session.scalar(select(Account).where(Account.number == row))
                assert account is not None
                account.balance += 1  # and its version with it
            else:
                await session.execute(text("UPDATE accounts SET version = version + 1 WHERE number = :n"), {"n": row})
            await session.commit()
        self.versions[row] = version
        self.changes.append((asyncio.get_running_loop().time(), row, version))

    def check(self, wait: Wait) -> None:
        changes = [(at, version) for at, row, version in self.changes if row == wait.row]
        known = wait.current if wait.seen is None else wait.seen
        due = [at for at, version in changes if version > known and at <= wait.deadline]
        if wait.task.cancelled():
            return
        error = wait.task.exception()
        if error is None:
            assert wait.task.result() > known, "not news"
            if due:
                late = wait.ended - max(due[0], wait.began)
                assert late <= INTERVAL + SLACK + self.held, f"{late:.2f} s after the change"
        else:
            assert isinstance(error, WaitTimeoutError), error
            assert not due or wait.seen is None, "a change was missed"
            assert wait.ended >= wait.deadline - 0.01
        assert wait.ended <= wait.deadline + 1.0 + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("read_settings", [{}, None], ids=["declared", "undeclared"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=st.lists(actions, min_size=6, max_size=30))
@example(script=[("wait", 1, "loaded", 0.2), ("cancel", 0)])  # before its first step
async def test_no_wait_misses_a_change_ends_late_or_leaves_anything(
    script: list[tuple[Any, ...]],
    engine: AsyncEngine,
    session_maker: SessionMaker,
    redis_url: str,
    read_settings: dict[str, str] | None,
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        await connection.execute(text("DELETE FROM accounts"))
        await connection.execute(
            text("INSERT INTO accounts SELECT 'eu', n, 'open', 0, 1 FROM generate_series(1, :n) AS n"), {"n": ROWS}
        )
    coordinator = Coordinator(session_maker, redis=redis_url, read_settings=read_settings)
    async with Redis.from_url(redis_url) as redis, coordinator:
        world = World(session_maker, redis)
        with pytest.MonkeyPatch.context() as patch:
            interpose(patch, world)
            await play(world, script)
        for wait in world.waits:
            world.check(wait)
        watcher = coord.waiting.watcher.Watcher.of(engine)
        assert watcher.waiters == 0
        assert not any(poller.waiters for poller in watcher._pollers.values())
        await all_given_back(engine)


async def play(world: World, script: list[tuple[Any, ...]]) -> None:
    loop = asyncio.get_running_loop()
    for action in script:
        began, holding = loop.time(), not all(gate.is_set() for gate in world.gates.values())
        await world.do(action)
        world.held += (loop.time() - began) * holding
    world.release()
    if world.waits:
        await asyncio.wait([wait.task for wait in world.waits])
    for session in world.sessions:  # also of a wait that was cancelled before it began
        await session.close()


def interpose(patch: pytest.MonkeyPatch, world: World) -> None:
    """Stand between the reads and their waiters, and between Redis and the bell."""
    rows_of, on_answer = Reader._rows, Subscriber._on_answer

    async def gated(self: Reader, *arguments: Any) -> Any:
        await world.gates["before"].wait()
        found = await rows_of(self, *arguments)
        await world.gates["after"].wait()
        return found

    def lossy(self: Subscriber, answer: Any) -> None:
        if answer[0] == b"message" and world.lost:
            world.lost -= 1
        else:
            on_answer(self, answer)

    patch.setattr(Reader, "_rows", gated)
    patch.setattr(Subscriber, "_on_answer", lossy)


async def test_a_read_that_was_under_way_takes_no_watch_behind_what_its_caller_has_read(
    session_maker: SessionMaker, observer: Connection, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of, found_older, delivered = Reader._rows, asyncio.Event(), asyncio.Event()

    async def held(self: Reader, *arguments: Any) -> Any:
        found = await rows_of(self, *arguments)
        if any(getattr(each, "name", None) == "older" for row in found.values() for each in row):
            found_older.set()
            await delivered.wait()
        return found

    monkeypatch.setattr(Reader, "_rows", held)
    async with (
        Coordinator(session_maker, read_settings={}),
        session_maker() as session,
        watch_row(session, User, user, interval=0.02) as states,
    ):
        row = await anext(states)
        await observer.execute("UPDATE users SET name = 'older'")
        await found_older.wait()
        await observer.execute("UPDATE users SET name = 'newest'")
        await session.refresh(row)
        await session.commit()
        following = asyncio.ensure_future(anext(states))
        (waiter,) = waiters()
        await eventually(lambda: waiter._signal is not None)
        delivered.set()
        assert (await following).name == "newest"
