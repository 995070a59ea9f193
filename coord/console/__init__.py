"""The console: who waits for what, and a way to act, in any FastAPI or Starlette application.

    app.mount("/console", console(session_maker, full_token=os.environ["CONSOLE_TOKEN"]))

`pip install "coord[console]"`. docs/console.md says what each page shows, what it costs, and who may see it.
"""

from __future__ import annotations

try:
    from coord.console.application import console
except ModuleNotFoundError as error:
    if error.name != "jinja2":
        raise
    raise ImportError('the console needs jinja2: pip install "coord[console]"') from error

__all__ = ["console"]
