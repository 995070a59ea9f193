"""The trace that a job belongs to, carried from whoever enqueued it; nothing without OpenTelemetry."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

propagate: Any
context: Any
try:
    from opentelemetry import context, propagate
except ImportError:  # it came with FastAPI; nothing here needs it
    context = propagate = None

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def current_trace() -> dict[str, str] | None:
    """The current trace context, as the configured propagators write it."""
    if propagate is None:
        return None
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier or None


@contextmanager
def continued(trace: Mapping[str, str] | None) -> Iterator[None]:
    """Spans that the block starts belong to that trace."""
    if propagate is None or not trace:
        yield
        return
    token = context.attach(propagate.extract(trace))
    try:
        yield
    finally:
        context.detach(token)
