"""The feed: what is written of a job is read again as it was, and what anybody else has written is no job."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coord.jobs.feed import Message, id_of, queue_key
from coord.jobs.model import new_id

JOB = Message(
    task="a_task",
    args=[5, "ä\0\ud800", None, [{}]],
    kwargs={"fast": True, "of": -0.0},
    attempt=3,
    attempts=10,
    timeout=2.5,
    trace={"traceparent": "00-1-2-03"},
    enqueued=1_700_000_000_000,
    unknown_since=1_700_000_000_001,
)
BARE = Message("a_task", [], {}, 1, None, None, None, 0)


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


def test_arqs_own_jobs_are_not_the_ledgers() -> None:
    own: dict[str, Any] = {"t": None, "f": "a_task", "a": [], "k": {}, "et": 5}
    assert Message.read(json.dumps(own).encode()) is None


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
        forged(c=5),
        forged(c=[]),
        forged(c=[None, None]),
        forged(c=[None, None, None, None]),
        forged(c="abc"),
        forged(f=None),
        forged(f=5),
        forged(f=["a_task"]),
        forged(f=""),
        forged(f="a\0b"),
        forged(f="\ud800"),
        forged(f="x" * 501),
        forged(a={}),
        forged(a="abc"),
        forged(a=None),
        forged(a=nested(150)),
        forged(k=[]),
        forged(k=None),
        forged(t=None),
        forged(t="3"),
        forged(t=True),
        forged(t=3.0),
        forged(t=0),
        forged(t=-1),
        forged(t=2**31),
        forged(et=None),
        forged(et=2**53),
        forged(et=1.5),
        forged(u="now"),
        forged(c=["3", None, None]),
        forged(c=[None, "5", None]),
        forged(c=[None, 0, None]),
        forged(c=[None, -1, None]),
        forged(c=[None, 10**400, None]),
        forged(c=[None, None, [1]]),
        forged(c=[None, None, {"traceparent": 5}]),
        forged(c=[None, None, "trace"]),
        forged(a=[float("nan")]),
        forged(a=[float("inf")]),
        forged().replace(b"-0.0", b"1e999"),
        forged().replace(b"-0.0", b"1" + b"0" * 5000),
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_is_no_job_is_garbled(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a job"):
        Message.read(text)


def test_an_id_is_the_ledgers_only_as_it_writes_it() -> None:
    id_ = new_id()
    assert id_of(str(id_)) == id_
    for other in (id_.hex, str(id_).upper(), f"{{{id_}}}", id_.urn, "", "cron:a_task", "0" * 32):
        assert id_of(other) is None


def test_the_default_queue_is_arqs_and_no_other_is() -> None:
    keys = [queue_key(*names) for names in (("coord", "default"), ("coord", "slow"), ("other", "default"))]
    assert keys[0] == "arq:queue"
    assert len(set(keys)) == 3
