"""The worker: arq's own, on a Redis client that picks jobs up promptly, with a ledger to answer to.

settings.py     worker_settings, what `arq module.Settings` runs
shift.py        what is open while a worker runs
redis.py        Redis as arq sees it
pickup.py       claiming jobs, and saying how claims ended
claims.py       what this worker has claimed
messages.py     jobs as arq reads them
scripts.py      the scripts that move arq's keys
link.py         the connection they go by
address.py      where Redis is
running.py      one attempt, from its start to any of its ends
hooks.py        the application's own, around it
endings.py      those ends, as the ledger is told
keeper.py       the heartbeat, in a thread of its own
census.py       who else lives
reconciler.py   what Redis has lost
rescue.py       what dead workers leave
pruning.py      what the ledger forgets
shutdown.py     SIGTERM
"""
