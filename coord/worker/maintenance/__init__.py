"""What a worker does beside its jobs: one file, one class and one loop each.

heartbeat.py   says that this worker lives, and what it runs
beat.py        the process that says it, a script of its own
registry.py    who else lives
leader.py      which of them looks after the queue
rescuer.py     what dead workers leave
reconciler.py  what Redis has lost
scheduler.py   what comes near its time: from the ledger into Redis
ticker.py      jobs of periodic slots; jobs/periodic.py says which, missed ones included
turnkeeper.py  has worker/turns.py pass on the turn of a key that nobody has passed on
canceller.py   what is not wanted any more
pruner.py      what the ledger forgets
rows.py        queued jobs, as they read them
loops.py       the shape that they share
"""
