"""Histories of requests under faults, and what must be true of each: recorded by clients, checked afterwards.

    history = [Operation(...), ..., Effect("parcel 1", "label 7"), Row("parcel 1", 2), LedgerJob(...)]
    verdict = check(history)
    assert verdict.holds, str(verdict)

records.py  what a history consists of, and each record as a line of JSON
files.py    a history in a file, and who writes operations into it
rules.py    what must hold, a pure function for each rule
verdict.py  all rules over a history of any length, in bounded memory

A file is checked again with `python -m coord.testing.history FILE`.
"""

from __future__ import annotations

from coord.testing.history.files import HistoryFile, Recorder
from coord.testing.history.records import (
    Bounds,
    Calm,
    Complaint,
    Effect,
    FaultSpan,
    LedgerJob,
    Number,
    Operation,
    Outcome,
    Record,
    Row,
)
from coord.testing.history.rules import RULES, Violation
from coord.testing.history.verdict import Verdict, check

__all__ = [
    "RULES",
    "Bounds",
    "Calm",
    "Complaint",
    "Effect",
    "FaultSpan",
    "HistoryFile",
    "LedgerJob",
    "Number",
    "Operation",
    "Outcome",
    "Record",
    "Recorder",
    "Row",
    "Verdict",
    "Violation",
    "check",
]
