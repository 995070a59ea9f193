"""coord with all that is there to see it: metrics, timings, and spans that OpenTelemetry's SDK collects and drops."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry

from benchmarks.roundtrip.contenders.coord import Coord
from coord.metrics import Metrics


class Dropping(SpanExporter):
    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class Seen(Coord):
    async def work(self) -> None:
        self._see()
        await super().work()

    async def open(self) -> None:
        self._see()
        await super().open()

    def _see(self) -> None:
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(Dropping()))
        trace.set_tracer_provider(provider)
        Metrics(CollectorRegistry()).watch(self.orders.engine)
