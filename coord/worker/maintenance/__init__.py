"""What a worker does beside its jobs: one file, one class and one loop each.

heartbeat.py   says that this worker lives, and what it runs
beat.py        the process that says it, a script of its own
registry.py    who else lives
leader.py      which of them looks after the queue
rescuer.py     what dead workers leave
reconciler.py  what Redis has lost
scheduler.py   what comes near
ticker.py      what is periodic
turnkeeper.py  whose turn it is, if nobody has passed it on
canceller.py   what is not wanted any more
pruner.py      what the ledger forgets
rows.py        queued jobs, as they read them
loops.py       the shape that they share
"""
