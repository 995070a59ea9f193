"""Sentry's SDK, with no network, sees requests, statements and errors, and nothing that it patches breaks the trip."""

from __future__ import annotations

import json
import sys

import pytest

from tests.commands import ended
from tests.shop import ROOT

pytestmark = pytest.mark.usefixtures("tables", "ledger")


async def test_the_round_trip_is_traced_and_an_error_told(database_url: str, redis_url: str) -> None:
    status, out, error = await ended(sys.executable, "-m", "tests.sentry_app", database_url, redis_url, cwd=ROOT)
    assert status == 0, error
    told = json.loads(out.splitlines()[-1])
    assert (told["answer"], told["status"]) == ("renamed", 500)
    assert {"fastapi", "sqlalchemy", "asyncpg", "redis", "arq"} <= {*told["integrations"]}
    (request,) = [each for each in told["sent"] if each.get("transaction") == "/users/{user_id}"]
    spans = [span["description"] for span in request["spans"]]
    for statement in ("INSERT INTO users", "INSERT INTO coord_jobs", "SELECT 1, users.id"):
        assert any(str(each).startswith(statement) for each in spans), (statement, spans)
    (event,) = [each for each in told["sent"] if "exception" in each]
    assert event["exception"]["values"][-1]["value"] == "the handler's own"
