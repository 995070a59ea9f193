"""`Prefer` is read leniently: what it cannot mean is ignored, and nothing that a client sends is an error."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coord.http import Preference

CAP = 25.0


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", Preference()),
        ("wait=10", Preference(10)),
        ('wait="10"', Preference(10)),
        ('wait="\\1\\0"', Preference(10)),
        ("WAIT \t= 10", Preference(10)),
        ("wait=007", Preference(7)),
        ("respond-async", Preference(respond_async=True)),
        ("respond-async, wait=10", Preference(10, True)),
        ("wait=10,respond-async", Preference(10, True)),
        ("Respond-Async; foo=bar, wait=3;x", Preference(3, True)),
        ("respond-async=yes", Preference(respond_async=True)),
        (",, ,wait=1, ,", Preference(1)),
        ("return=minimal, wait=2, handling=lenient", Preference(2)),
    ],
)
def test_preferences_are_read_in_every_spelling_of_the_rfc(header: str, expected: Preference) -> None:
    assert Preference.of([header]) == expected


@pytest.mark.parametrize(
    "header",
    [
        *(
            "wait",
            "wait=",
            "wait=abc",
            "wait=-1",
            "wait=+1",
            "wait=1.5",
            "wait=1e3",
            "wait=0x10",
            "wait=\u0663",
            "wait=²",
        ),
        *('foo="wait=5, wait=6"', 'foo=";", "wait=5"', "foo;wait=5", 'foo="wait=5', "wait=5 6", "wait==5", "wait=(5)"),
        *("=5", '"wait"=5', "wait5", "no-wait=5", "wait=5@", "\x00wait=5"),
    ],
)
def test_a_malformed_preference_is_ignored(header: str) -> None:
    assert Preference.of([header]) == Preference()


def test_the_first_of_two_equal_preferences_counts() -> None:
    assert Preference.of(["wait=1, wait=2"]) == Preference.of(["wait=1", "wait=2"]) == Preference(1)
    assert Preference.of(["wait=soon, wait=2"]) == Preference()
    assert Preference.of(['foo="never closed, wait=3', "wait=2"]) == Preference(2)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", CAP), ("wait=3", 3), ("wait=26", CAP), (f"wait={'9' * 5_000}", CAP), ("respond-async", 0), ("wait=0", 0)],
)
def test_a_wait_is_clamped_to_the_cap(header: str, seconds: float) -> None:
    assert Preference.of([header]).seconds(CAP) == seconds


@pytest.mark.parametrize(
    ("header", "waited", "accepted", "applied"),
    [
        ("wait=3", True, True, "wait=3"),
        ("wait=300", True, False, "wait=25"),
        (f"wait={'9' * 5_000}", True, False, "wait=25"),
        ("wait=3", False, False, None),
        ("respond-async", True, True, "respond-async"),
        ("respond-async", True, False, None),
        ("respond-async, wait=3", True, True, "wait=3, respond-async"),
        ("respond-async, wait=3", True, False, "wait=3"),
        ("return=minimal", True, True, None),
    ],
)
def test_preference_applied_lists_only_what_made_a_difference(
    header: str, waited: bool, accepted: bool, applied: str | None
) -> None:
    assert Preference.of([header]).applied(CAP, waited=waited, accepted=accepted) == applied


PIECES = ["wait", "respond-async", "=", ",", ";", '"', "\\", " ", "\t", "5", "a", "@", "\x00", "\xff", "é", "\n"]


@given(st.lists(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)), max_size=4))
def test_no_header_value_is_an_error(headers: list[str]) -> None:
    preference = Preference.of(headers)
    assert 0 <= preference.seconds(CAP) <= CAP
    preference.applied(CAP, waited=True, accepted=True)


@given(st.integers(0, 10**30), st.sampled_from(["", "x=1, ", 'y="a, b";z, ', ", ", "bad=, @, "]))
def test_a_wait_is_found_beside_anything_else(seconds: int, before: str) -> None:
    assert Preference.of([f"{before}wait={seconds};z=1, more"]).wait == float(seconds)


@pytest.mark.parametrize("piece", ['"\\",', "a;", '"', "\\", " ", "a ", 'a="', ",", "a", '",', "=;"])
def test_parsing_takes_linear_time(piece: str) -> None:
    began = time.process_time()
    for end in ("", '"', "@", ","):
        Preference.of(["a=" + piece * (100_000 // len(piece)) + end])
    assert time.process_time() - began < 1
