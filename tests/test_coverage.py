"""`make coverage` says which package it is, and which lines."""

from __future__ import annotations

from tests.coverage import package_of, ranges, report


def file(covered: int, *missing: int) -> dict[str, object]:
    return {"summary": {"covered_lines": covered, "num_statements": covered + len(missing)}, "missing_lines": missing}


def test_lines_that_follow_each_other_are_written_as_one_range() -> None:
    assert [*ranges([7, 3, 5, 6])] == ["3", "5-7"]


def test_a_package_is_counted_without_its_subpackages() -> None:
    assert package_of("coord/worker/maintenance/rescuer.py") == "coord.worker.maintenance"
    files = {"coord/locks.py": file(3, 9), "coord/jobs/model.py": file(1), "coord/jobs/options.py": file(1, 4, 5)}
    lines = [" ".join(line.split()) for line in report(files).splitlines()]
    assert lines == [
        "coord 75.0 % 3 of 4 statements",
        "coord.jobs 50.0 % 2 of 4 statements",
        "all 62.5 % 5 of 8 statements",
        "",
        "coord/jobs/options.py: 4-5",
        "coord/locks.py: 9",
    ]
