"""One process of a turn: a worker, or a requester that does what its parent tells it. Gone when the parent is.

    python -m benchmarks.roundtrip.side worker|requester MODULE:CLASS SCENE FIRST

Commands come as lines of JSON, `[name, arguments]`, and so do the answers go. It runs in a contender's environment: of
this checkout it imports only what needs no more than SQLAlchemy and asyncpg.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from dataclasses import asdict
from typing import Any

from benchmarks.loop import run
from benchmarks.roundtrip.contender import contender
from benchmarks.roundtrip.orders import Scene
from benchmarks.roundtrip.requester import Requester

Commands = asyncio.Queue[list[Any]]


def main(role: str, path: str, scene: str, first: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    run(_main(role, path, Scene(**json.loads(scene)), int(first), answers))


async def _main(role: str, path: str, scene: Scene, first: int, answers: Any) -> None:
    commands: Commands = asyncio.Queue()
    threading.Thread(target=_hear, args=(asyncio.get_running_loop(), commands), daemon=True).start()
    played = contender(path, scene)
    if role == "worker":
        await played.work()
        raise RuntimeError("the worker has ended")
    requester = Requester(played, first)
    while True:
        name, arguments = await commands.get()
        tally = await getattr(requester, name)(**arguments)
        print(json.dumps(tally and asdict(tally)), file=answers, flush=True)


def _hear(loop: asyncio.AbstractEventLoop, commands: Commands) -> None:
    for line in sys.stdin:
        loop.call_soon_threadsafe(commands.put_nowait, json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
