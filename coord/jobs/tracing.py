"""The trace that a job belongs to, carried from its `enqueue`; nothing without OpenTelemetry."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

propagate: Any
context: Any
try:
    from opentelemetry import context, propagate
except ImportError:  # it came with FastAPI; nothing here needs it
    context = propagate = None

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager


def current_trace() -> dict[str, str] | None:
    """What OpenTelemetry's current context holds, as the configured propagators write it.

    They take it from there (OpenTelemetry's specification, "Propagators API"): an empty one has nothing to take.
    """
    if propagate is None or not context.get_current():
        return None
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier or None


def continued(trace: Mapping[str, str] | None) -> AbstractContextManager[None]:
    """Spans that the block starts belong to that trace."""
    return nullcontext() if propagate is None or not trace else _continued(trace)


@contextmanager
def _continued(trace: Mapping[str, str]) -> Iterator[None]:
    token = context.attach(propagate.extract(trace))
    try:
        yield
    finally:
        context.detach(token)
