"""Waiting for a row to change: one loop reads for all who wait for rows of one mapped class.

wait.py            wait_for_row_change and watch_row: what may be waited for, and until when
baseline.py        what the caller has seen of the row
session_reader.py  what the session itself reads, and how a row becomes its own
handed.py          a wait that is handed the rows of the shared read
woken.py           a wait that the shared read only wakes, and whose session reads by itself
waiter.py          what both are: a row, a deadline, and the job that may end it
job_wait.py        the wait's job
watcher.py         all waits of an engine
poller.py          those for one class, and the loop that reads for them
reader.py          the shared read: many rows in one query
statements.py      the statements of both reads
"""
