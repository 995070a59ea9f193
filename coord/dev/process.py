"""Child processes that never outlive this one, however it ends.

Run as a script, this module is the launcher that makes it so: it gives up root if told to, asks the kernel to signal
it when its parent dies, and becomes the command. That order is the point: a change of user clears the request
(prctl(2), PR_SET_PDEATHSIG), so it cannot be made before one. Only Linux can be asked; elsewhere a child of a process
that was killed with SIGKILL lives on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PR_SET_PDEATHSIG = 1


class Owner(NamedTuple):
    """Whom a child runs as, when that is not whoever starts it."""

    uid: int
    gid: int


def spawn(
    command: Sequence[str | Path],
    *,
    stdout: int | IO[bytes],
    env: Mapping[str, str] | None = None,
    owner: Owner | None = None,
    directory: Path | None = None,
    at_parent_death: signal.Signals = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start `command`, named by its absolute path, in a session of its own: a terminal's Ctrl-C does not reach it.

    Its errors go where its output goes. Safe to call from any thread.
    """
    identity = [str(owner.uid), str(owner.gid)] if owner else ["", ""]
    launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(at_parent_death)), *identity]
    started: Future[subprocess.Popen[bytes]] = Future()

    def keep() -> None:
        try:
            process = subprocess.Popen(
                [*launcher, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=directory,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            started.set_exception(error)
            return
        started.set_result(process)
        _kill_group_at_end(process)
        process.wait()

    # To the kernel the parent is the thread that forked, so the child gets one that lives exactly as long as it does.
    threading.Thread(target=keep, name=f"keeper of {command[0]}", daemon=True).start()
    return started.result()


def _kill_group_at_end(process: subprocess.Popen[bytes]) -> None:
    """What a child has started in its own group, and leaves behind, goes with it."""
    if sys.platform == "linux":
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen[bytes], *signals: signal.Signals, grace: float) -> None:
    """Send each of `signals` in turn, allowing `grace` seconds after each, then kill the process and its group."""
    for number in signals:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _launch(parent: int, at_parent_death: int, owner: Owner | None, command: list[str]) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the interpreter ignores it, and exec would pass that on
    if owner is not None:
        os.setgroups([])
        os.setgid(owner.gid)
        os.setuid(owner.uid)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, at_parent_death, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent died before its child had begun")
    os.execv(command[0], command)


if __name__ == "__main__":
    _parent, _signal, _uid, _gid, *_command = sys.argv[1:]
    _launch(int(_parent), int(_signal), Owner(int(_uid), int(_gid)) if _uid else None, _command)
