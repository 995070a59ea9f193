"""What the API and the workers must agree on: how a job is written in Redis, and under which keys.

message.py   a job as a message, made from its row in the ledger and from nothing else
keys.py      the keys of a queue
scripts.py   the scripts that move messages between them
handover.py  what hands jobs over after their commit
"""
