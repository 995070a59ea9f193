"""Where an answer leads, for the OpenAPI document: an operation's id is the name of its function."""

from __future__ import annotations

from typing import Any


def _links(parameter: str, value: str, *operations: str) -> dict[str, Any]:
    return {name: {"operationId": name, "parameters": {parameter: value}} for name in operations}


ACCEPTED = _links("job_id", "$response.body#/job/id", "read_job", "job_events")
"""What to look at while the job goes on."""
PLACED: dict[str, Any] = {
    "headers": {"Location": {"description": "Where the order is.", "schema": {"type": "string"}, "required": True}},
    "links": _links("order_id", "$response.body#/id", "read_order", "fulfil_order", "order_events"),
}
STOCKED: dict[str, Any] = {"links": _links("sku", "$response.body#/sku", "read_stock")}
