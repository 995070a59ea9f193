"""Hints in Redis: what is said of a commit after it, and heard by whoever waits. All of it may be lost.

changes.py    what a session's transaction has changed, once it has committed
channels.py   what rows, tables and jobs are called
publisher.py  saying it, in order
bell.py       listening
wire.py       a connection to Redis without a task of its own
outage.py     saying once that Redis is away, and once that it is back
"""
