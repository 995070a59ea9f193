"""Hints in Redis: published after a commit, for the processes that wait for its rows. Any of them may be lost.

changes.py    what a session's transaction has changed, once it has committed
channels.py   the channels of rows and tables
client.py     connections to Redis that nobody else uses, and what is said to it at once
publisher.py  sends commands, in order
subscriber.py notifies the listeners of channels
bell.py       both, as one process uses them
outage.py     logs once that Redis is away, and once that it is back
"""
