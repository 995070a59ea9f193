"""The checker: legal histories are accepted, and each way to break one is refused by the rule that it breaks."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coord.testing.history.verdict
from coord.testing.history import (
    RULES,
    Bounds,
    Calm,
    Complaint,
    Effect,
    FaultSpan,
    HistoryFile,
    LedgerJob,
    Number,
    Operation,
    Outcome,
    Record,
    Recorder,
    Row,
    check,
)
from coord.testing.history.records import from_line, to_line
from tests import warm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    History = list[Record]

DEADLINE = 5.0
times = st.floats(0, 100, allow_nan=False)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """What clients see of effects that land at some moment: each on a row, which it takes from version 1 to 2.

    An effect that was promised or shown has a job; one that was answered with an error may have one or none.
    """
    effects, label = draw(st.integers(1, 6)), 0
    history: History = [FaultSpan("API frozen", 20.0, 30.0, stops_clients=True), Calm(1000.0)]
    for which in range(effects):
        name, placed = f"parcel {which}", draw(times)
        lands, has_job = placed + draw(times), draw(st.integers(0, 4)) > 0
        asked = [draw(st.tuples(times, st.floats(0, DEADLINE), st.booleans(), st.booleans())) for _ in range(3)]
        label += has_job
        value = f"label {label}"
        for after, took, is_answered, is_read in asked:
            began = placed + after
            ended = began + took
            has_landed = has_job and lands < (began + ended) / 2  # when the answer's row was read
            fields = _answer(name, value, is_answered and has_job, is_read, has_landed)
            operation = Operation(len(history), f"POST {name}", began, ended, deadline=DEADLINE, **fields)
            history.append(operation)
        if has_job:
            history += [Effect(name, value), Number("label", label, name)]
            history.append(LedgerJob(f"job of {name}", name, "done", 990.0 + which, 1000.0 + which))
        history.append(Row(name, 2 if has_job else 1))
    return history


def _answer(name: str, value: str, is_answered: bool, is_read: bool, has_landed: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"row": name, "version": 2 if has_landed else 1}
    if is_read:
        return {"outcome": Outcome.READ, "answer": "200", **shown}
    if not is_answered:
        return {"outcome": Outcome.UNKNOWN, "answer": "ReadError", "effect": name, "calm": False}
    if has_landed:
        return {"outcome": Outcome.DONE, "answer": "200", "effect": name, "saw": value, **shown}
    job = f"job of {name}"
    return {"outcome": Outcome.PROMISED, "answer": "202", "effect": name, "job": job, "calm": False, **shown}


@given(histories())
@settings(max_examples=100)
def test_a_legal_history_is_accepted(history: History) -> None:
    assert check(history).holds, check(history)


def done(name: str = "parcel 0", number: int = 1, at: float = 1.0, version: int = 2, **fields: Any) -> Operation:
    answered = {"outcome": Outcome.DONE, "answer": "200", "observer": "client 1", "deadline": DEADLINE}
    shown = {"effect": name, "saw": "label 1", "row": name, "version": version}
    return Operation(number, "POST", at, at + 1, **{**answered, **shown, **fields})


def promised(**fields: Any) -> Operation:
    return done(**{"outcome": Outcome.PROMISED, "saw": None, "version": 1, **fields})


LEGAL: History = [
    done(),
    Effect("parcel 0", "label 1"),
    Row("parcel 0", 2),
    LedgerJob("job", "parcel 0", "done", 990.0, 1001.0),
    Number("label", 1, "parcel 0"),
    Calm(1000.0),
]


def changed(kind: type[Any], **fields: Any) -> Callable[[History], History]:
    return lambda history: [replace(one, **fields) if isinstance(one, kind) else one for one in history]


def without(kind: type[Any], *more: Record) -> Callable[[History], History]:
    return lambda history: [one for one in history if not isinstance(one, kind)] + [*more]


def and_also(*more: Record) -> Callable[[History], History]:
    return lambda history: [*history, *more]


CORRUPTIONS: dict[str, tuple[Callable[[History], History], set[str]]] = {
    "an answer shows another effect": (changed(Operation, saw="label 2"), {"own-effect"}),
    "an answer shows none": (changed(Operation, saw=None), {"own-effect"}),
    "the database has another value": (changed(Effect, value="label 9"), {"own-effect"}),
    "applied twice": (changed(Effect, times=2), {"once"}),
    "applied, and its job cancelled": (changed(LedgerJob, state="cancelled"), {"once"}),
    "applied, and there is no job": (without(LedgerJob), {"once"}),
    "the job is done, and nothing applied": (without(Effect), {"once", "lost"}),
    "an answer, and nothing is there": (
        lambda history: [one for one in history if not isinstance(one, Effect | LedgerJob)],
        {"lost"},
    ),
    "an answer, and an effect that was applied no times": (
        lambda history: changed(LedgerJob, state="failed")(changed(Effect, times=0)(history)),
        {"lost"},
    ),
    "promised, and no job": (lambda _: [promised(), Row("parcel 0", 1)], {"lost", "served"}),
    "promised, and its job failed": (
        lambda _: [promised(), Row("parcel 0", 1), LedgerJob("job", "parcel 0", "failed", 1.0, 2.0)],
        {"lost", "served"},
    ),
    "another effect's job is named": (changed(Operation, job="job of another"), {"lost"}),
    "a row was shown that is not there": (without(Row), {"lost"}),
    "a version was shown that the row never had": (changed(Operation, version=3), {"lost"}),
    "older than what another was shown": (and_also(done(number=2, at=3.0, version=1, observer="client 2")), {"stale"}),
    "not there, after another was shown it": (
        and_also(done(number=2, at=3.0, version=0, observer="client 2", effect=None, outcome=Outcome.READ)),
        {"stale"},
    ),
    "a stream goes back": (
        lambda history: [
            *history,
            Operation(2, "events", 0.0, 3.0, Outcome.READ, observer="stream", row="parcel 0", version=2),
            Operation(3, "events", 0.0, 4.0, Outcome.READ, observer="stream", row="parcel 0", version=1),
        ],
        {"forward"},
    ),
    "a client is shown less than before": (and_also(done(number=2, at=3.0, version=1)), {"forward"}),
    "late": (changed(Operation, ended=1.0 + DEADLINE + 1.01), {"late"}),
    "a job is not final": (changed(LedgerJob, finished=None), {"final"}),
    "a job was final too late": (changed(LedgerJob, finished=1000.0 + 30.1), {"final"}),
    "a job that came later was final too late": (changed(LedgerJob, created=1001.0, finished=1031.1), {"final"}),
    "a gap": (changed(Number, number=2), {"sequence"}),
    "a double": (and_also(Number("label", 1, "parcel 1")), {"sequence"}),
    "a number below the first": (and_also(Number("label", 0, "parcel 1")), {"sequence"}),
    "answered without their effect": (
        and_also(*[promised(number=2 + n, at=0.0, observer=f"client {2 + n}") for n in range(4)]),
        {"served"},
    ),
    "the application complains": (and_also(Complaint("a lock is held")), {"invariant"}),
    "the application complains under a name of its own": (
        and_also(Complaint("two guests in seat 7", rule="double booking")),
        {"invariant"},
    ),
}


def test_what_is_corrupted_below_was_legal() -> None:
    assert check(LEGAL).holds


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_history_is_refused_by_its_rule(name: str) -> None:
    corrupt, rules = CORRUPTIONS[name]
    assert set(check(corrupt(LEGAL)).counts) == rules, check(corrupt(LEGAL))


def test_each_rule_is_broken_by_something() -> None:
    assert {rule for _, rules in CORRUPTIONS.values() for rule in rules} == {*RULES}


@given(histories(), st.sampled_from(sorted(CORRUPTIONS)), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_a_corruption_is_found_among_whatever_else_there_is(history: History, name: str, chance: Any) -> None:
    corrupt, rules = CORRUPTIONS[name]
    others = [one for one in history if not isinstance(one, Number | Calm | FaultSpan)]
    mine = [_renamed(one) for one in corrupt(LEGAL)]
    together = [*others, *mine]
    chance.shuffle(together)
    assert set(check(together).counts) >= rules - {"served"}


def _renamed(record: Record) -> Record:
    """Of a parcel that no generated history has."""
    renamed = {name: "mine" for name in ("effect", "row") if getattr(record, name, None) == "parcel 0"}
    return replace(record, **renamed)  # type: ignore[arg-type]


@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_matter(history: History, chance: Any) -> None:
    broken = [*history, Effect("parcel 0", "label 0", times=3)]
    expected = check(broken)
    chance.shuffle(broken)
    assert check(broken).counts == expected.counts


@given(histories())
def test_a_record_is_a_line_and_back(history: History) -> None:
    assert [from_line(to_line(record)) for record in history] == history


def test_an_answer_is_not_late_for_the_time_in_which_nobody_could_answer() -> None:
    late = replace(done(), ended=1.0 + DEADLINE + 8.0)
    frozen = FaultSpan("API frozen", 2.0, 9.5, stops_clients=True)

    def broken(fault: FaultSpan) -> set[str]:
        history: History = [late, *LEGAL[1:], fault]
        return set(check(history).counts)

    assert broken(frozen) == set()
    assert broken(replace(frozen, stops_clients=False)) == broken(replace(frozen, ended=8.0)) == {"late"}


def test_two_who_ask_at_the_same_time_may_see_either_state() -> None:
    slow = done(number=2, at=0.5, version=1, observer="client 2", effect=None, outcome=Outcome.READ)
    history: History = [*LEGAL, replace(slow, ended=9.0, deadline=None)]
    assert check(history).holds


def test_a_task_may_fail_where_that_is_said() -> None:
    failed: History = [promised(), Row("parcel 0", 1), LedgerJob("job", "parcel 0", "failed", 1.0, 2.0)]
    assert check(failed, Bounds(may_fail=True, served=0.0)).holds


def test_a_job_without_an_effect_is_not_looked_at() -> None:
    """One for tomorrow, say."""
    assert check([*LEGAL, LedgerJob("reminder", None, "queued", 990.0)]).holds


def test_a_violation_names_the_operations() -> None:
    verdict = check([*LEGAL, done(number=2, at=3.0, version=1)])
    assert "client 1 was shown parcel 0 in version 2, and then in version 1" in str(verdict)
    assert "#1 client 1 POST  1.000–2.000 s  → 200, saw 'label 1', parcel 0 in version 2" in str(verdict)
    assert "✗ forward" in str(verdict)
    assert "✓ once" in str(verdict)


def test_violations_are_counted_and_some_of_them_shown() -> None:
    verdict = check([Complaint(str(number)) for number in range(100)])
    assert (verdict.counts["invariant"], len(verdict.violations)) == (100, 5)
    assert "broken 100 times" in str(verdict)
    assert "broken once\n" in str(check([Complaint("1")]))


def test_a_rule_that_had_nothing_to_check_says_so_and_has_no_tick() -> None:
    """But for what the application checks itself, of which only what it has found is a record."""
    assert "nothing to check" not in str(check(LEGAL))
    lines = str(check([])).splitlines()
    assert [line.split()[1] for line in lines if "nothing to check" not in line] == ["invariant"]
    assert sum(line.startswith("✓") for line in lines) == 1
    read = Operation(1, "GET", 1.0, 2.0, Outcome.READ, observer="client 1", row="parcel 0", version=0)
    ticked = [line.split()[1] for line in str(check([read])).splitlines() if line.startswith("✓")]
    assert ticked == ["stale", "forward", "lost", "invariant"]


def written(path: Path, records: Sequence[Record]) -> HistoryFile:
    with Recorder(path) as recorder:
        for record in records:
            recorder.write(record)
    return HistoryFile(path)


def test_a_long_history_is_judged_in_parts_as_if_it_were_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records: History = [Calm(0.0)]
    for n in range(1, 501):
        name = f"parcel {n}"
        records += [replace(one, **_named(one, name, n)) for one in LEGAL if not isinstance(one, Calm)]
    records += [done("parcel 77", 1000, at=5.0, version=1, saw="label 77"), Effect("parcel 88", "label 88")]
    history = written(tmp_path / "history", records)
    whole = check(history)
    monkeypatch.setattr(coord.testing.history.verdict, "MAX_IN_MEMORY", 100)
    assert check(history).counts == whole.counts == {"stale": 1, "once": 1}


def _named(record: Record, name: str, number: int) -> dict[str, Any]:
    fields: dict[type[Any], dict[str, Any]] = {
        Operation: {"effect": name, "row": name, "saw": f"label {number}", "number": number, "observer": name},
        Effect: {"effect": name, "value": f"label {number}"},
        Row: {"row": name},
        LedgerJob: {"effect": name, "job": f"job {number}"},
        Number: {"number": number, "owner": name},
    }
    return fields[type(record)]


async def test_a_file_is_checked_again_from_the_command_line(tmp_path: Path) -> None:
    written(tmp_path / "legal", LEGAL)
    written(tmp_path / "broken", changed(Effect, times=2)(LEGAL))
    (tmp_path / "torn").write_text(to_line(LEGAL[0]) + "\n" + '{"record": "Effect", "eff')
    ended = {
        name: await warm.ended("coord.testing.history", str(tmp_path / name), env=os.environ)
        for name in ("legal", "broken", "torn", "missing")
    }
    statuses = {name: status for name, (status, _, _) in ended.items()}
    assert statuses == {"legal": 0, "broken": 1, "torn": 2, "missing": 2}
    assert "parcel 0 was applied 2 times; job job is done after attempt 1" in ended["broken"][1]
    assert f"{tmp_path / 'torn'}, line 2: no record of a history" in ended["torn"][2]


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[]", "null", '{"record": "Other"}', '{"record": "Calm"}', '{"record": "Calm", "at": 1, "more": 2}'],
)
def test_what_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no record of a history"):
        from_line(line)
