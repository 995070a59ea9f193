"""One trace from the request to its answer, over two processes; and nothing at all where OpenTelemetry is not."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI
from opentelemetry.trace import SpanKind
from sqlalchemy import select

from coord import create_db_dependency, enqueue
from coord.http import Reply, RequestLimits, reply
from coord.jobs.model import jobs
from tests.models import User
from tests.serving import eventually, served
from tests.shop import ROOT
from tests.workers import Notes, Office, process

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from tests.spans import Spans

    Span = dict[str, Any]


def traced(office: Office, spans: Spans) -> FastAPI:
    """A request has a span of its own, as instrumentations of FastAPI give it one."""
    app = FastAPI()
    app.add_middleware(RequestLimits)
    database = Depends(create_db_dependency(office.session_maker))

    @app.post("/users/{user_id}")
    async def renamed(user_id: int, answer: Annotated[Reply, Depends(reply)], session: AsyncSession = database) -> str:
        with spans.provider.get_tracer("test").start_as_current_span("POST", kind=SpanKind.SERVER):
            session.add(User(id=user_id))
            job = await enqueue(session, "rename", user_id)
            await session.commit()
            user = await answer.row(session, User, user_id, columns=[User.name], job=job, interval=20)
        assert user is not None
        return user.name

    return app


def named(found: list[Span], name: str) -> list[Span]:
    return sorted((span for span in found if span["name"] == name), key=lambda span: str(span["start_time"]))


async def test_one_trace_leads_from_the_request_to_its_answer_over_two_processes(
    office: Office, notes: Notes, spans: Spans, tables: None
) -> None:
    async with process(office, notes, module="tests.traced_worker.Settings"):
        async with served(traced(office, spans)) as client:
            response = await client.post("/users/1", headers={"X-Request-ID": "req-7"})
        assert response.json() == "done"

        async def failed() -> bool:
            async with office.session_maker() as session:
                return (await session.execute(select(jobs.c.id).where(jobs.c.state == "failed"))).first() is not None

        await eventually(failed, within=20)
    here: list[Span] = [json.loads(span.to_json()) for span in spans.exporter.get_finished_spans()]
    there: list[Span] = json.loads((notes.directory / "spans").read_text())
    (request,), (send,), (wait,) = named(here, "POST"), named(here, "send rename"), named(here, "wait User")
    (run,), (lock,), (sent,) = named(there, "process rename"), named(there, "lock users"), named(there, "send follow")
    trace = request["context"]["trace_id"]
    assert {span["context"]["trace_id"] for span in (send, wait, run, lock, sent)} == {trace}
    assert send["parent_id"] == wait["parent_id"] == request["context"]["span_id"]
    assert run["parent_id"] == send["context"]["span_id"]
    assert lock["parent_id"] == sent["parent_id"] == run["context"]["span_id"]
    assert (send["kind"], run["kind"]) == ("SpanKind.PRODUCER", "SpanKind.CONSUMER")
    for span, operation in ((send, "send"), (run, "process")):
        assert (
            span["attributes"].items()
            >= {
                "messaging.system": "coord",
                "messaging.destination.name": "default",
                "messaging.operation.name": operation,
                "messaging.message.id": wait["attributes"]["coord.wait.job_id"],
            }.items()
        )

    first, second = named(there, "process follow")
    assert first["context"]["trace_id"] == trace
    assert (first["parent_id"], first["links"]) == (sent["context"]["span_id"], [])
    assert second["context"]["trace_id"] != trace
    assert second["parent_id"] is None
    assert [link["context"]["span_id"] for link in second["links"]] == [sent["context"]["span_id"]]
    assert first["attributes"]["error.type"] == "arq.worker.Retry"
    assert second["attributes"]["error.type"] == "LookupError"
    assert "error.type" not in run["attributes"]


async def test_a_request_id_goes_with_the_job_into_the_log_of_its_worker(
    office: Office, notes: Notes, spans: Spans, tables: None
) -> None:
    async with process(office, notes, module="tests.traced_worker.Settings") as worker:
        async with served(traced(office, spans)) as client:
            await client.post("/users/1", headers={"X-Request-ID": "req-7"})
            await client.post("/users/2", headers={"X-Request-ID": 'not = a "request"'})
        said = await worker.says(r"job done job=\S+ task=rename .* trace_id=(\w+) request_id=(\S+)$")
        await worker.says('job retried .* task=follow attempt=1 reason="?Retry.* request_id=req-7$')
        await worker.says('job failed .* attempt=2 .*reason="LookupError: nothing to follow" .* request_id=req-7$')
    context = spans.named("POST")[0].get_span_context()
    assert context is not None
    trace = f"{context.trace_id:032x}"
    assert (said[1], said[2]) == (trace, "req-7")
    assert worker.count("request_id=") == 3


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("opentelemetry", "prometheus_client", "rich"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
import coord
from coord import telemetry
with telemetry.sending("t", "q", 1) as trace, telemetry.processing("t", "q", 1, attempt=1, trace={"traceparent": "x"}):
    with telemetry.internal("lock") as span:
        telemetry.note(span, {"a": 1})
print(trace, telemetry.ids())
"""


def test_coord_does_without_opentelemetry_prometheus_and_rich() -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT]
    ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("None {}\n", "")
