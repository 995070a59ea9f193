"""Waiting for a row to change: one loop reads for all who wait for rows of one mapped class.

wait.py       wait_for_row_change and watch_row: what may be waited for, and until when
baseline.py   what the caller has seen of it
stored.py     a value as the database would have it
waiter.py     one wait
watcher.py    all waits of an engine
group.py      those for one class, and the loop that reads for them
hearing.py    the bells that wake it
deadlines.py  when each of them is over
reading.py    many rows in one query
plain.py      the same without the ORM, where that gives the same
adoption.py   the row found, as the session's own instance
"""
