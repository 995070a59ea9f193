"""Hints in Redis: what is said of a commit after it, and heard by whoever waits. All of it may be lost.

changes.py    what a session's transaction has changed, once it has committed
channels.py   what rows, tables and jobs are called
client.py     the redis-py client that all of this goes through
publisher.py  sending it, in order
subscriber.py hearing it
bell.py       both, as one process uses them
outage.py     saying once that Redis is away, and once that it is back
"""
