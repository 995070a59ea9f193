"""The worker: it takes jobs of the ledger out of a feed and runs them, inside arq's process, beside arq's own jobs.

settings.py     worker_settings, what `arq module.Settings` runs
config.py       what it was told, checked
lifecycle.py    what is open while a worker runs, and how it stops
state.py        what the parts share
fetcher.py      the loop that takes jobs and starts them
executor.py     one attempt, from its start to any of its ends
running.py      the jobs that run, and how many more may
turns.py        of the jobs with one key, which may run
finalizer.py    those ends, as the ledger is told
failure.py      what is kept of an error
address.py      where Redis is
patience.py     how arq's own client outlives an absence of Redis
stopping.py     signals
maintenance/    what it does beside its jobs
"""
