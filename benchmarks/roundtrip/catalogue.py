"""Who takes part, how each learns that its job is done, and what it guarantees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.machine import ROOT


@dataclass(frozen=True, slots=True)
class Guarantees:
    """What holds as measured; a reason where a reader might expect otherwise."""

    atomic: str
    """Is the job committed with the row, or neither?"""
    durable: str
    """Is the job still there when all of Redis is lost?"""
    once: str
    """Is the effect applied once, whenever the worker crashes?"""
    free: str
    """Does a wait hold no connection?"""

    @property
    def letters(self) -> str:
        answers = {"A": self.atomic, "D": self.durable, "O": self.once, "F": self.free}
        return " ".join(letter if answer.startswith("yes") else "–" for letter, answer in answers.items())


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    title: str
    path: str
    """"module:Class", as `contender` takes it."""
    packages: tuple[str, ...]
    """Those whose versions matter."""
    wait: str
    guarantees: Guarantees
    root: Path = ROOT
    """The checkout whose code plays."""
    python: str | None = None
    """The minor version that its packages need, unless any will do."""

    @property
    def environment(self) -> str:
        return self.path.partition(":")[0]

    @property
    def is_peer(self) -> bool:
        return self.environment not in ("floor", "coord", "seen")


BY_HAND = ("SQLAlchemy", "asyncpg", "redis")
LOST_WITH_ITS_WORKER = "no: a job that was taken is lost with its worker"
REDIS_ONLY = "no"
AFTER_THE_COMMIT = "no: enqueued after the commit"
ONE_SUBSCRIBER = "yes: one subscriber for all"
POLLED = "the job's state every 10 ms, since it has no wait; then reads the row"
POSTGRESQL = Guarantees(
    "yes", "yes: it needs none", "no: a crashed attempt may be applied twice", "yes, between its polls"
)

FLOOR = Entry(
    "floor",
    "floor, PUBLISH after the commit",
    "floor:Publish",
    BY_HAND,
    "BLPOP worker; PUBLISH after the commit, one subscriber, then reads the row",
    Guarantees(AFTER_THE_COMMIT, REDIS_ONLY, LOST_WITH_ITS_WORKER, ONE_SUBSCRIBER),
)
COORD = Entry(
    "coord",
    "coord",
    "coord:Coord",
    ("arq", "SQLAlchemy", "asyncpg", "redis"),
    "`wait_for_row_change(…, job=job)`, which gives the row",
    Guarantees("yes", "yes", "yes", ONE_SUBSCRIBER),
)
SEEN = replace(
    COORD,
    name="coord-seen",
    title="coord, seen",
    path="seen:Seen",
    packages=(*COORD.packages, "prometheus-client", "opentelemetry-sdk"),
    wait=f"{COORD.wait}; with metrics, and spans to an exporter that drops them",
)
OTHERS = (
    Entry(
        "floor-notify",
        "floor, NOTIFY in the transaction",
        "floor:Notify",
        BY_HAND,
        "BLPOP worker; NOTIFY in the job's transaction, one LISTEN connection, then reads the row",
        Guarantees(AFTER_THE_COMMIT, REDIS_ONLY, LOST_WITH_ITS_WORKER, "yes: one listener for all"),
    ),
    Entry(
        "arq",
        "arq + fastapi-toolsets, as documented",
        "arq:Documented",
        ("arq", "fastapi-toolsets"),
        "`wait_for_row_change`, interval 0.5 s, which gives the row; arq's poll delay 0.5 s",
        Guarantees(AFTER_THE_COMMIT, REDIS_ONLY, "no: it may be applied twice", "yes, between its polls"),
    ),
    Entry(
        "arq-tuned",
        "arq, tuned",
        "arq:Tuned",
        ("arq",),
        "`Job.result(poll_delay=0.01)`, then reads the row; arq's poll delay 0.01 s",
        Guarantees(AFTER_THE_COMMIT, REDIS_ONLY, "no: it may be applied twice", "yes, between its polls"),
    ),
    Entry(
        "saq",
        "SAQ, refresh",
        "saq:Refresh",
        ("saq",),
        "`Job.refresh(until_complete=10)`, by publish and subscribe, then reads the row",
        Guarantees(
            AFTER_THE_COMMIT,
            REDIS_ONLY,
            "no: a crashed attempt is aborted, or with `retries` may be applied twice",
            ONE_SUBSCRIBER,
        ),
    ),
    Entry(
        "saq-apply",
        "SAQ, apply",
        "saq:Apply",
        ("saq",),
        "`Queue.apply(poll_interval=0.01)`, then reads the row",
        Guarantees(
            AFTER_THE_COMMIT,
            REDIS_ONLY,
            "no: a crashed attempt is aborted, or with `retries` may be applied twice",
            "yes, between its polls",
        ),
    ),
    Entry(
        "taskiq",
        "taskiq, list broker",
        "taskiq:Taskiq",
        ("taskiq", "taskiq-redis"),
        "`wait_result(check_interval=0.01)`, then reads the row",
        Guarantees(AFTER_THE_COMMIT, REDIS_ONLY, LOST_WITH_ITS_WORKER, "yes, between its polls"),
    ),
    Entry(
        "pgqueuer",
        "PgQueuer, default",
        "pgqueuer:Default",
        ("pgqueuer",),
        "one `CompletionWatcher`: LISTEN, debounced by 50 ms, then reads the row; batches of 10",
        Guarantees(
            "no: enqueued after the commit, as by its pool; its asyncpg driver can join a transaction",
            "yes: it needs none",
            "no: it may be applied twice",
            "yes: one listener for all",
        ),
    ),
    Entry(
        "pgqueuer-tuned",
        "PgQueuer, tuned",
        "pgqueuer:Tuned",
        ("pgqueuer",),
        "the same, debounced by 1 ms; batches of 1",
        Guarantees(
            "no: enqueued after the commit, as by its pool; its asyncpg driver can join a transaction",
            "yes: it needs none",
            "no: it may be applied twice",
            "yes: one listener for all",
        ),
    ),
    Entry(
        "procrastinate",
        "procrastinate",
        "procrastinate:Procrastinate",
        ("procrastinate", "psycopg"),
        "the job's status every 10 ms, since it has no wait; then reads the row",
        Guarantees(
            "no: enqueued after the commit; with sessions on psycopg it can join a transaction",
            "yes: it needs none",
            "no: a crashed attempt stays as it is until it is retried, and then may be applied twice",
            "yes, between its polls",
        ),
    ),
    Entry("awa", "Awa, default", "awa:Default", ("awa-pg",), f"{POLLED}; its worker polls every 200 ms", POSTGRESQL),
    Entry("awa-tuned", "Awa, tuned", "awa:Tuned", ("awa-pg",), f"{POLLED}; its worker polls every 10 ms", POSTGRESQL),
    Entry(
        "oban", "Oban", "oban:Oban", ("oban", "psycopg"), f"{POLLED}; sessions on psycopg", POSTGRESQL, python="3.12"
    ),
)
ALL = (FLOOR, COORD, SEEN, *OTHERS)


def other_checkout(root: Path) -> Entry:
    """coord as another checkout has it, say the commit before a change."""
    return replace(COORD, name="other", title=f"coord in {root.name}", root=root.resolve())
