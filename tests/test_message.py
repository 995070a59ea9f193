"""The feed: what is written of a job is read again as it was, and what anybody else has written is no job."""

from __future__ import annotations

import json
import time
from typing import Any
from uuid import UUID

import pytest

from coord.jobs.model import Job, JobState
from coord.queue.handover import hand_over
from coord.queue.keys import QueueKeys, due_of, rank, rank_of, soon_member
from coord.queue.message import Message

JOB = Message(
    id=UUID("01a22890-2e16-7908-9134-dc9968b881d5"),
    attempt=3,
    task="a_task",
    args=[5, "ä\0\ud800", None, [{}]],
    kwargs={"fast": True, "of": -0.0},
    timeout=2.5,
    deaths=2,
    trace={"traceparent": "00-1-2-03"},
)
BARE = Message(UUID("01a22890-2e16-7908-9134-dc9968b881d6"), 1, "a_task", [], {})


def forged(**changes: Any) -> bytes:
    """JOB as Redis holds it, but for these keys."""
    return json.dumps(json.loads(JOB.text()) | changes).encode()


@pytest.mark.parametrize("message", [JOB, BARE])
def test_a_job_is_read_as_it_was_written(message: Message) -> None:
    found = Message.read(message.text().encode())
    assert found == message
    assert found.arguments == message.arguments
    assert repr(found) == repr(message), "a sign was lost"


def test_the_arguments_are_the_ledgers_to_the_letter() -> None:
    assert BARE.arguments == "[[],{}]"
    assert JOB.arguments == '[[5,"\\u00e4\\u0000\\ud800",null,[{}]],{"fast":true,"of":-0.0}]'


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x80\x04\x95",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"{",
        b"[" * 100_000,
        b"{}garbage",
        forged(id=None),
        forged(id=5),
        forged(id="not one"),
        forged(task=None),
        forged(task=5),
        forged(task=["a_task"]),
        forged(task=""),
        forged(task="a\0b"),
        forged(task="\ud800"),
        forged(task="x" * 501),
        forged(arguments=None),
        forged(arguments=[]),
        forged(arguments=[[]]),
        forged(arguments={}),
        forged(arguments="abc"),
        forged(arguments=[{}, {}]),
        forged(arguments=["abc", {}]),
        forged(arguments=[[], []]),
        forged(arguments=[[], None]),
        forged(arguments=[nested(150), {}]),
        forged(attempt=None),
        forged(attempt="3"),
        forged(attempt=True),
        forged(attempt=3.0),
        forged(attempt=0),
        forged(attempt=-1),
        forged(attempt=2**31),
        forged(timeout="5"),
        forged(timeout=0),
        forged(timeout=-1),
        forged(timeout=10**400),
        forged(deaths="many"),
        forged(deaths=None),
        forged(trace=[1]),
        forged(trace={"traceparent": 5}),
        forged(trace="trace"),
        forged(arguments=[[float("nan")], {}]),
        forged(arguments=[[float("inf")], {}]),
        forged().replace(b"-0.0", b"1e999"),
        forged().replace(b"-0.0", b"1" + b"0" * 5000),
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_is_no_job_is_garbled(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a job"):
        Message.read(text)


def test_two_messages_of_one_row_are_equal_to_the_letter() -> None:
    """Or a job that is handed over twice would be run twice."""
    assert JOB.text() == Message.read(JOB.text().encode()).text()


def test_the_keys_of_a_queue_share_a_hash_tag_and_no_two_queues_share_a_key() -> None:
    several = [QueueKeys(), QueueKeys("other"), QueueKeys("coord", "slow"), QueueKeys("other", "slow")]
    found = [[keys.feed, keys.soon, keys.taken, keys.epoch, keys.health("here")] for keys in several]
    for keys, names in zip(several, found, strict=True):
        assert all(name.startswith(f"{{{keys.namespace}:{keys.queue}}}:") for name in names)
    assert len({name for names in found for name in names}) == 20


@pytest.mark.parametrize("priority", [-100, -1, 0, 1, 100])
def test_a_score_says_the_priority_and_the_time_exactly(priority: int) -> None:
    for due in (0, 1_700_000_000_123, 2**42 - 1):
        score = float(rank(priority) * 2**42 + due)
        assert (rank_of(score), due_of(score)) == (100 - priority, due)
    assert soon_member("{}", priority) == f"{100 - priority:03d}{{}}"


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), -1.0, 1e300])
def test_any_score_has_a_rank(score: float) -> None:
    assert 0 <= rank_of(score) <= 200
    assert not due_of(score) > 2**42


def test_a_delay_counts_from_the_enqueue_and_not_from_the_commit() -> None:
    job = Job(id=JOB.id, attempt=1, task="a_task", queue="default", arguments=[[], {}], priority=0, deaths=0)
    job.state = JobState.QUEUED
    job.due_in, job.due_said_at = 6.0, time.monotonic() - 5
    ((command,),) = hand_over([job], "coord").values()
    assert 0 < int(command[5]) <= 1_000
