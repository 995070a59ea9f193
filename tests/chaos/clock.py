"""Run a module whose clock is off: `python -m tests.chaos.clock SECONDS MODULE [ARGUMENT …]`.

Before anything else is imported, `time` and `datetime` are told another time; what measures time goes on as it does.
"""

from __future__ import annotations

import datetime
import runpy
import sys
import time
from typing import Any


class _Instances(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _real)


_real = datetime.datetime


def put_off(seconds: float) -> None:
    """Have this process's clock show so many seconds more."""
    now, now_ns = time.time, time.time_ns

    class Datetime(_real, metaclass=_Instances):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return _real.now(tz) + datetime.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> Any:
            return _real.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(seconds=seconds)

    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + round(seconds * 1e9)
    datetime.datetime = Datetime  # type: ignore[misc]


if __name__ == "__main__":
    put_off(float(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
