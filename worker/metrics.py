"""What Prometheus is told of the shop: by the API at `/metrics`, by a worker on a port if it is given one."""

from __future__ import annotations

from coord.metrics import Metrics
from worker.database import engine
from worker.environment import metrics_host, metrics_port

metrics = Metrics()
metrics.watch(engine)


def serve_metrics() -> None:
    if (port := metrics_port()) is not None:
        metrics.serve(port, host=metrics_host())
