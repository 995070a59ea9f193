"""Waiting for a row to change: one loop reads for all who wait for rows of one mapped class.

wait.py          wait_for_row_change and watch_row: what may be waited for, and until when
waits.py         whose read a wait takes, and when that is the answer
baseline.py      what the caller has seen of the row
stored.py        whether PostgreSQL has a value as the caller has seen it
watcher.py       all waits of an engine
poller.py        those for one class, and the loop that reads for them
waiter.py        one wait
handed.py        where the rows of the shared read are handed out
woken.py         where the shared read only wakes, and each session reads by itself
job_wait.py      the job that may end a wait
subscription.py  the messages that wake a poller
deadlines.py     when each wait is over
reader.py        the shared read: many rows in one query
own.py           the session's own read
statements.py    the statements of both
settings.py      what rows depend on, declared
adoption.py      the row found, as the session's own instance
"""
