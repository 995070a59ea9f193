"""A model of the queue: ledger, feed, what was taken, heartbeats and a clock, and all that may happen between steps.

What it shows of `docs/architecture.md`: no interleaving loses a job, and none runs one attempt on two workers that are
taken for living. It takes the real bounds: how late a worker still begins what it has popped, how soon its heartbeat
names what runs, and how long the reconciler finds a job nowhere before it hands it over again.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coord.worker.fetcher import BACK_SECONDS, BLOCK_SECONDS, LATE_SECONDS
from coord.worker.maintenance.beat import BEAT_SECONDS, LOOK_SECONDS, UNNAMED_SECONDS
from coord.worker.maintenance.reconciler import MISSING_SECONDS, TAKEN_SECONDS
from coord.worker.maintenance.registry import DEAD_SECONDS

Key = tuple[int, int]
"""A job and its attempt."""
STALE = LATE_SECONDS + BLOCK_SECONDS
"""Since a pop was asked for, after which nothing is begun."""
NAMED = UNNAMED_SECONDS + LOOK_SECONDS
"""Since its start, by when a job is in its worker's heartbeat, whatever holds the worker up."""


def test_the_bounds_leave_room_for_one_another() -> None:
    assert STALE + UNNAMED_SECONDS < MISSING_SECONDS, "begun and named before it is handed over again, or not begun"
    assert STALE < BACK_SECONDS < MISSING_SECONDS, "what is too late to be begun goes back while nobody else has it"
    assert STALE + NAMED <= MISSING_SECONDS + TAKEN_SECONDS
    assert NAMED < TAKEN_SECONDS
    assert 2 * BEAT_SECONDS < DEAD_SECONDS


@dataclass
class Worker:
    lives: bool = True
    blocked: bool = False
    """A task keeps its event loop from running: nothing is read, started, said or ended. Its heartbeat beats."""
    frozen: bool = False
    """Nothing of it runs, the heartbeat's signs of life included."""
    popped: list[tuple[Key, float]] = field(default_factory=list)
    """What Redis has given it and it has not read yet, and when."""
    running: dict[Key, float] = field(default_factory=dict)
    """Since when; this is the heartbeat's board."""
    unsaid: set[Key] = field(default_factory=set)
    """What is in no `taken` set yet."""
    row: tuple[float, frozenset[Key]] | None = (0.0, frozenset())
    """Its heartbeat in the ledger: when, and what it names."""


WORKERS = st.integers(0, 1)


class QueueModel(RuleBasedStateMachine):
    """The reconciler looks in four steps, between which anything else may happen."""

    stale, back, missing_for = STALE, BACK_SECONDS, MISSING_SECONDS

    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.ledger: dict[int, int] = {}
        """The attempt of each unfinished job."""
        self.jobs = 0
        self.feed: set[Key] = set()
        self.taken: dict[Key, float] = {}
        self.workers = [Worker() for _ in range(2)]
        self.missing: dict[Key, float] = {}
        self.look: list[set[Key]] = []

    @rule(handed_over=st.booleans())
    def enqueue(self, handed_over: bool) -> None:
        self.ledger[self.jobs] = 1
        if handed_over:
            self.feed.add((self.jobs, 1))
        self.jobs += 1

    @rule(number=WORKERS)
    def pop(self, number: int) -> None:
        worker = self.workers[number]
        credible = worker.row is not None and self.now - worker.row[0] < DEAD_SECONDS - 1
        if self.feed and worker.lives and not worker.blocked and not worker.frozen and credible:
            key = min(self.feed)
            self.feed.remove(key)
            worker.popped.append((key, self.now))

    @rule(number=WORKERS, blocked=st.booleans(), seconds=st.sampled_from([0.5, 1.0, 2.5]))
    def pop_and_be_held_up(self, number: int, blocked: bool, seconds: float) -> None:
        """By a task that keeps the loop busy, or by a network that does not bring the answer."""
        self.pop(number)
        self.workers[number].blocked = blocked
        self.wait(seconds)

    @rule(number=WORKERS)
    def go_on(self, number: int) -> None:
        self.workers[number].blocked = self.workers[number].frozen = False
        self.read(number)

    @rule(number=WORKERS)
    def take_and_start(self, number: int) -> None:
        """As it mostly goes."""
        for step in (self.pop, self.read, self.say_what_was_taken):
            step(number)

    @rule(number=WORKERS)
    def read(self, number: int) -> None:
        """What is late goes back; what is too late even for that is left, and handed over again by the reconciler."""
        worker = self.workers[number]
        if worker.lives and not worker.blocked and not worker.frozen:
            for key, popped_at in worker.popped:
                if self.now - popped_at <= self.stale and key not in worker.running:
                    worker.running[key] = self.now
                    worker.unsaid.add(key)
                elif self.stale < self.now - popped_at < self.back:
                    self.feed.add(key)
            worker.popped = []

    @rule(number=WORKERS)
    def say_what_was_taken(self, number: int) -> None:
        worker = self.workers[number]
        if worker.lives and not worker.blocked and not worker.frozen:
            self.taken |= dict.fromkeys(worker.unsaid, self.now)
            worker.unsaid = set()

    @rule(number=WORKERS)
    def push_back(self, number: int) -> None:
        """As a worker does that stops, or whose queue is paused."""
        worker = self.workers[number]
        if worker.lives and not worker.blocked and not worker.frozen and worker.popped:
            self.feed |= {key for key, popped_at in worker.popped if self.now - popped_at <= self.stale}
            worker.popped = []

    @rule(number=WORKERS)
    def beat(self, number: int) -> None:
        worker = self.workers[number]
        if worker.lives and not worker.frozen:
            worker.row = (self.now, frozenset(worker.running))

    @rule(number=WORKERS, again=st.booleans())
    def finish(self, number: int, again: bool) -> None:
        """With its effect, or with an error that passes: then it is tried again, as the next attempt."""
        worker = self.workers[number]
        if worker.lives and not worker.blocked and not worker.frozen and worker.running:
            job, attempt = min(worker.running)
            del worker.running[job, attempt]
            worker.unsaid.discard((job, attempt))
            if self.ledger.get(job) == attempt:
                if again:
                    self.ledger[job] = attempt + 1
                    self.feed.add((job, attempt + 1))
                else:
                    del self.ledger[job]

    @rule(number=WORKERS, blocked=st.booleans())
    def block(self, number: int, blocked: bool) -> None:
        self.workers[number].blocked = blocked

    @rule(number=WORKERS, frozen=st.booleans())
    def freeze(self, number: int, frozen: bool) -> None:
        self.workers[number].frozen = frozen

    @rule(number=WORKERS)
    def kill(self, number: int) -> None:
        worker = self.workers[number]
        worker.lives, worker.popped, worker.running = False, [], {}

    @rule(number=WORKERS)
    def restart(self, number: int) -> None:
        if not self.workers[number].lives and self.workers[number].row is None:
            self.workers[number] = Worker(row=(self.now, frozenset()))

    @rule()
    def flush(self) -> None:
        """`FLUSHALL`."""
        self.feed, self.taken = set(), {}

    @rule()
    def rescue(self) -> None:
        for worker in self.workers:
            if worker.row is not None and self.now - worker.row[0] > DEAD_SECONDS:
                for job, attempt in worker.row[1]:
                    if self.ledger.get(job) == attempt:
                        self.ledger[job] = attempt + 1
                        self.feed.add((job, attempt + 1))
                worker.row = None

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.5]))
    def wait(self, seconds: float) -> None:
        """While a worker's heartbeat has signs of life, it names in time what runs; and somebody reconciles."""
        until = self.now + seconds
        while self.now < until:
            self.now = round(self.now + 0.1, 3)
            if not self.look:
                self.look_in_one_go()
            for worker in self.workers:
                named = frozenset() if worker.row is None else worker.row[1]
                late = any(self.now - since >= NAMED - 0.1 for key, since in worker.running.items() if key not in named)
                due = worker.row is None or self.now - worker.row[0] >= BEAT_SECONDS
                if worker.lives and not worker.frozen and (late or due):
                    worker.row = (self.now, frozenset(worker.running))

    def look_in_one_go(self) -> None:
        self.look_at_the_ledger()
        self.look_at_the_feed()
        self.look_at_what_was_taken()
        self.look_at_the_heartbeats()

    @precondition(lambda self: not self.look)
    @rule()
    def look_at_the_ledger(self) -> None:
        self.look = [set(self.ledger.items())]

    @precondition(lambda self: len(self.look) == 1)
    @rule()
    def look_at_the_feed(self) -> None:
        self.look.append(self.look[0] - self.feed)

    @precondition(lambda self: len(self.look) == 2)
    @rule()
    def look_at_what_was_taken(self) -> None:
        self.look.append(self.look[1] - {key for key, at in self.taken.items() if self.now - at < TAKEN_SECONDS})

    @precondition(lambda self: len(self.look) == 3)
    @rule()
    def look_at_the_heartbeats(self) -> None:
        held = {key for worker in self.workers if worker.row is not None for key in worker.row[1]}
        absent = self.look[2] - held
        self.look = []
        self.missing = {key: self.missing.get(key, self.now) for key in absent}
        for key, since in list(self.missing.items()):
            if self.now - since >= self.missing_for:
                self.feed.add(key)
                del self.missing[key]

    @invariant()
    def nothing_runs_twice_on_workers_taken_for_living(self) -> None:
        living = [worker for worker in getattr(self, "workers", []) if worker.lives and worker.row is not None]
        begun = [key for worker in living for key in worker.running]
        current = [key for key in begun if self.ledger.get(key[0]) == key[1]]
        assert len(current) == len(set(current)), current

    def teardown(self) -> None:
        """Left to themselves, whatever has happened, living workers do all that is to be done."""
        if not hasattr(self, "workers"):
            return
        for worker in self.workers:
            worker.blocked = worker.frozen = False
        for _ in range(40 + 4 * self.jobs):
            self.rescue()
            self.look_in_one_go()
            for number in range(2):
                self.restart(number)
                self.pop(number)
                self.read(number)
                self.say_what_was_taken(number)
                self.finish(number, again=False)
            self.wait(0.5)
        assert not self.ledger, "lost"


@pytest.mark.parametrize(
    ("bound", "value", "blocked", "seconds"),
    [
        ("missing_for", 0.4, False, 0.5),
        ("stale", 60.0, True, 2.5),
        ("stale", 60.0, False, 2.5),
        ("back", 60.0, False, 2.5),
    ],
)
def test_without_each_bound_a_job_would_run_twice(bound: str, value: float, blocked: bool, seconds: float) -> None:
    """The model sees what the bounds are for."""
    for is_kept in (True, False):
        model = QueueModel()
        model.start()
        if not is_kept:
            setattr(model, bound, value)
        model.enqueue(handed_over=True)
        model.pop_and_be_held_up(0, blocked=blocked, seconds=seconds)
        model.take_and_start(1)
        model.go_on(0)
        model.take_and_start(0)
        with nullcontext() if is_kept else pytest.raises(AssertionError):
            model.nothing_runs_twice_on_workers_taken_for_living()


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[*HealthCheck]
)
