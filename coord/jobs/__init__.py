"""Jobs: a ledger in PostgreSQL of what is to be done and what is done.

model.py            the tables: Job, attempts, heartbeats, queues, schedules, cancellations
migrations.py       making and upgrading them
ids.py              ids of jobs and workers
arguments.py        what a task is given, as JSON
options.py          task_options
enqueue.py          enqueue: a row in the caller's transaction
bulk.py             enqueue_many: any number of them in one statement
periodic.py         schedules, and the slots that they have
attempt.py          one attempt, as a task's ctx carries it
job_transaction.py  claim, fence, effect and completion in one commit
queries.py          looking at jobs and their attempts, cancelling and retrying one
batches.py          cancelling and retrying many
pauses.py           pausing a queue
"""
