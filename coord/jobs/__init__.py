"""Jobs: a ledger in PostgreSQL of what is to be done and what is done.

model.py        Job, the heartbeats, and wishes to cancel, as tables
migrations.py   making and upgrading them
arguments.py    what a task is given, as JSON
options.py      task_options
enqueue.py      enqueue: a row in the caller's transaction
attempt.py      one attempt, as a task's ctx carries it
transaction.py  job_transaction: claim, fence, effect and completion in one commit
queries.py      looking at jobs, cancelling and retrying them
"""
