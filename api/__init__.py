"""The shop's HTTP side, run as `uvicorn api:app`: copy it and put your own routes in."""

from __future__ import annotations

from api.application import app

__all__ = ["app"]
