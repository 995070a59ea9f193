"""The shop's worker, run as `arq worker.Settings`: copy it and put your own tables and tasks in."""

from __future__ import annotations

from worker.settings import Settings

__all__ = ["Settings"]
