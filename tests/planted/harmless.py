"""Changes that break nothing: another number, another word, another order."""

from __future__ import annotations

from tests.planted.edits import Edit

FETCHER = "coord/worker/fetcher.py"

HARMLESS = {
    "a pop waits for less long": Edit(FETCHER, "BLOCK_SECONDS = 0.5", "BLOCK_SECONDS = 0.3"),
    "an idle worker looks more often": Edit(FETCHER, "IDLE_SECONDS = 0.5", "IDLE_SECONDS = 0.2"),
    "a line of the log has other words": Edit(
        "coord/worker/lifecycle.py",
        "Takes jobs of the queue %s, %d at a time",
        "Ready for the queue %s, %d jobs at once",
    ),
    "a look compares fewer jobs": Edit("coord/worker/maintenance/reconciler.py", "REST = 100\n", "REST = 20\n"),
    "the first read of a wait comes later": Edit(
        "coord/waiting/poller.py", "DEFERRED_READ_SECONDS = 0.1", "DEFERRED_READ_SECONDS = 0.2"
    ),
    "waits poll at another interval": Edit(
        "coord/http/reply.py", "        interval: Seconds = 0.5,\n", "        interval: Seconds = 0.9,\n"
    ),
    "fewer jobs go in one command": Edit(
        "coord/queue/handover.py", "MAX_JOBS_PER_COMMAND = 100", "MAX_JOBS_PER_COMMAND = 3"
    ),
    "a dead worker is looked for more often": Edit(
        "coord/worker/maintenance/rescuer.py", "    interval = 0.5\n", "    interval = 0.3\n"
    ),
    "an end that could not be written is tried again sooner": Edit(
        "coord/worker/finalizer.py", "LEDGER_PAUSE_SECONDS = (0.2, 2.0)", "LEDGER_PAUSE_SECONDS = (0.1, 1.0)"
    ),
    "an answer has its members in another order": Edit(
        "parcels.py",
        '{"name": parcel.name, "label": parcel.label, "version": parcel.version}',
        '{"version": parcel.version, "label": parcel.label, "name": parcel.name}',
    ),
}
