"""An outage is said once, and its end once, however many report it and whatever some are refused."""

from __future__ import annotations

import logging

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ResponseError

from coord.notify.outage import Outage

AWAY = RedisConnectionError("nobody there")
REFUSED = NoPermissionError("No permissions to access a channel")
DISK = ResponseError("MISCONF Redis is configured to save RDB snapshots")


@pytest.fixture
def outage() -> Outage:
    return Outage(logging.getLogger("test.outage"), away="Redis is away", back="Redis is back")


def test_it_is_said_once_whoever_reports_it(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    for source in ("publisher", "subscriber", "publisher"):
        outage.report(AWAY, source)
    for source in ("publisher", "subscriber", "subscriber"):
        outage.report(None, source)
    assert caplog.messages == ["Redis is away: nobody there", "Redis is back"]


def test_one_who_hears_redis_answers_for_those_who_were_cut_off(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    outage.report(AWAY, "publisher")
    outage.report(None, "subscriber", everybody=True)
    assert caplog.messages == ["Redis is away: nobody there", "Redis is back"]


def test_what_redis_refuses_some_is_said_once_while_it_answers_others(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(18):
        outage.report(REFUSED, "publisher")
        outage.report(None, "link")
        outage.report(None, "subscriber", everybody=True)
    assert caplog.messages == [f"Redis is away: {REFUSED}"]


def test_each_kind_of_refusal_is_said_and_its_end(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.report(AWAY, "subscriber")
    for _ in range(3):
        outage.report(REFUSED, "publisher")
        outage.report(DISK, "link")
    outage.report(None, "subscriber", everybody=True)
    outage.report(None, "publisher")
    outage.report(None, "link")
    assert caplog.messages == [
        "Redis is away: nobody there",
        f"It refuses: {REFUSED}",
        f"It refuses: {DISK}",
        "Redis is back",
    ]


def test_an_error_without_words_is_told_by_its_name(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.report(ConnectionResetError(), "publisher")
    assert caplog.messages == ["Redis is away: ConnectionResetError"]
