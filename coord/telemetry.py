"""Spans for OpenTelemetry, by its API alone; where that is not installed, or nobody has imported it, nothing.

Names and attributes are those of its semantic conventions for messaging: `send {task}` is the producer's,
`process {task}` the consumer's. The first attempt of a job is a child of what enqueued it, a later one a root of its
own that is linked to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str | None] = ContextVar("coord.request_id", default=None)
"""Of the request that is handled, as its client or its proxy calls it."""
REQUEST_ID = "request-id"
"""Where that is in a job's trace."""
_LOADED = "opentelemetry.trace"
"""Whoever has spans to be collected has imported it."""


def _api(*, wanted: bool = False) -> Any:
    """The package, if it is in use, or `wanted` and installed."""
    if _LOADED not in sys.modules and not wanted:
        return None
    try:
        import opentelemetry.propagate
        import opentelemetry.trace
    except ImportError:
        return None
    return opentelemetry


_NOTHING = nullcontext()


@contextmanager
def sending(task: str, queue: str, job_id: object) -> Iterator[dict[str, str] | None]:
    """The span of an `enqueue`; yields the trace that the job carries, None if there is none."""
    api, own = _api(), request_id.get()
    carrier = {REQUEST_ID: own} if own else {}
    if api is None:
        yield carrier or None
        return
    tracer = _tracer(api)
    span: AbstractContextManager[Any] = nullcontext()
    if tracer is not None:
        attributes = _messaging("send", queue, job_id)
        span = tracer.start_as_current_span(f"send {task}", kind=api.trace.SpanKind.PRODUCER, attributes=attributes)
    with span:
        if api.context.get_current():  # an empty one has nothing to take
            api.propagate.inject(carrier)
        yield carrier or None


@contextmanager
def processing(
    task: str, queue: str, job_id: object, *, attempt: int, trace: Mapping[str, str] | None
) -> Iterator[Any]:
    """The span of an attempt, in which the task runs; yields it, or None."""
    token = request_id.set((trace or {}).get(REQUEST_ID))
    api = _api(wanted=bool(trace))
    try:
        with nullcontext() if api is None else _processing(api, task, queue, job_id, attempt, trace or {}) as span:
            yield span
    finally:
        request_id.reset(token)


@contextmanager
def _processing(
    api: Any, task: str, queue: str, job_id: object, attempt: int, trace: Mapping[str, str]
) -> Iterator[Any]:
    parent, tracer = api.propagate.extract(trace, context=api.context.Context()), _tracer(api)
    if tracer is None:
        token = api.context.attach(parent)
        try:
            yield None
        finally:
            api.context.detach(token)
        return
    sent = api.trace.get_current_span(parent).get_span_context()
    later = attempt > 1 and sent.is_valid
    with _span(
        api,
        tracer,
        f"process {task}",
        context=api.context.Context() if later else parent,
        kind=api.trace.SpanKind.CONSUMER,
        attributes={**_messaging("process", queue, job_id), "coord.job.attempt": attempt},
        links=[api.trace.Link(sent)] if later else [],
    ) as span:
        yield span


def internal(name: str) -> AbstractContextManager[Any]:
    """A span of coord's own between the two, or None."""
    api = _api()
    tracer = None if api is None else _tracer(api)
    return _NOTHING if tracer is None else _span(api, tracer, name)


@contextmanager
def _span(api: Any, tracer: Any, name: str, **options: Any) -> Iterator[Any]:
    """Of an error that passes it has the type alone."""
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False, **options) as span:
        try:
            yield span
        except BaseException as error:
            kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
            span.set_attribute("error.type", kind)
            span.set_status(api.trace.Status(api.trace.StatusCode.ERROR))
            raise


def note(span: Any, values: Mapping[str, object]) -> None:
    """Attributes of a span, if there is one."""
    if span is not None:
        span.set_attributes({f"coord.{name}": value for name, value in values.items() if value is not None})


def ids() -> dict[str, str]:
    """Of the request and the trace that this is part of, for logs."""
    api, own = _api(), request_id.get()
    found = None if api is None else api.trace.get_current_span().get_span_context()
    known = {"trace_id": f"{found.trace_id:032x}"} if found is not None and found.is_valid else {}
    return known | ({"request_id": own} if own else {})


def ids_of(trace: Mapping[str, str] | None) -> dict[str, str]:
    """The same of a job's trace."""
    told = trace or {}
    parent = told.get("traceparent", "").split("-")
    known = {"trace_id": parent[1]} if len(parent) == 4 else {}
    return known | ({"request_id": told[REQUEST_ID]} if told.get(REQUEST_ID) else {})


def _messaging(operation: str, queue: str, job_id: object) -> dict[str, str]:
    return {
        "messaging.system": "coord",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
        "messaging.message.id": str(job_id),
    }


def _tracer(api: Any) -> Any:
    """None where the application has set no provider: spans that nobody collects are not made."""
    provider = api.trace.get_tracer_provider()
    return None if isinstance(provider, api.trace.ProxyTracerProvider) else provider.get_tracer("coord")
