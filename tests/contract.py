"""What an OpenAPI document promises of an answer, held against one."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import jsonschema_rs

if TYPE_CHECKING:
    from collections.abc import Mapping


class Contract:
    """An OpenAPI document, of which answers can be in breach."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._components = document["components"]
        self._validators: dict[str, Any] = {}
        self._operations = {
            (method.upper(), re.compile(re.sub(r"\{\w+\}", "[^/]+", path))): operation
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        }

    def check(self, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """An `AssertionError` for a status, header, media type or body that the operation does not declare."""
        declared = self._operation(method, path)["responses"]
        assert str(status) in declared, f"{status} is not declared"
        answer = declared[str(status)]
        for name, header in answer.get("headers", {}).items():
            assert name in headers or not header.get("required"), f"{name} is missing"
            if name in headers:
                kind = header["schema"]["type"]
                self._valid(header["schema"], int(headers[name]) if kind == "integer" else headers[name])
        content = answer.get("content")
        if content is None:
            assert body == b""
            return
        media_type = headers["content-type"].partition(";")[0]
        assert media_type in content, f"{media_type} is not declared"
        if media_type.endswith("json"):
            self._valid(content[media_type]["schema"], json.loads(body))

    def _operation(self, method: str, path: str) -> dict[str, Any]:
        found = [op for (verb, pattern), op in self._operations.items() if verb == method and pattern.fullmatch(path)]
        assert len(found) == 1, f"{method} {path} is {len(found)} operations"
        operation: dict[str, Any] = found[0]
        return operation

    def _valid(self, schema: dict[str, Any], value: Any) -> None:
        written = json.dumps(schema)
        if written not in self._validators:
            self._validators[written] = jsonschema_rs.validator_for({**schema, "components": self._components})
        self._validators[written].validate(value)
