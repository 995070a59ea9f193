"""What the pages of one console share: who may see them, what was read, what is remembered, how it is written."""

from __future__ import annotations

import hashlib
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from coord.blocking import blocking
from coord.console import wording
from coord.console.live import Reads
from coord.console.locks import LockHistory
from coord.console.timings import Timings
from coord.database.engine import engines_of, prepare
from coord.observation import observers
from coord.waiting.watcher import open_waits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.blocking import Backend
    from coord.console.access import Access
    from coord.waiting.watcher import OpenWait

HERE = Path(__file__).parent
ASSETS = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}
"""In `static/`; there are no others."""
LOCKS_INTERVAL_SECONDS = 1.0


class Desk:
    """Of one console; as long as it is there, it is told of this process's waits."""

    def __init__(self, session_maker: async_sessionmaker[AsyncSession], access: Access) -> None:
        for engine in engines_of(session_maker()):  # none, if it is bound later, in a lifespan
            prepare(engine)
        self.access = access
        self.session_maker = session_maker
        self.reads = Reads(session_maker)
        self.timings = Timings()
        self.history = LockHistory(self.timings)
        self.assets = {name: (HERE / "static" / name).read_bytes() for name in ASSETS}
        self._environment = _environment(hashlib.sha256(b"".join(self.assets.values())).hexdigest()[:12])
        observers.append(self.timings)
        finalize(self, observers.remove, self.timings)

    def render(self, template: str, **context: Any) -> str:
        """What a job says may have half a surrogate pair, which cannot be sent."""
        text = self._environment.get_template(template).render(context)
        return text.encode(errors="replace").decode()

    async def locks(self) -> Sequence[Backend]:
        """Who holds and who waits, read once a second for all who look; each look is remembered."""

        async def look(session: AsyncSession) -> Sequence[Backend]:
            found = await blocking(session)
            self.history.note(found)
            return found

        backends: Sequence[Backend] = await self.reads.get("locks", look, interval=LOCKS_INTERVAL_SECONDS)
        return backends

    def waits(self) -> Sequence[OpenWait]:
        """Of this process; nothing is read for it."""
        return open_waits(engines_of(self.session_maker()))


@cache
def _environment(version: str) -> Environment:
    """One for all consoles of a process: each would compile the templates again."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (wording.count, wording.span, wording.moment, wording.instant, wording.day, wording.clock, wording.short)
    made.filters |= {word.__name__: word for word in words}
    made.globals |= {"version": version, "zip": partial(zip, strict=False)}
    return made
