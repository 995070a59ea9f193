"""What `coord doctor` looks at. A check is an asynchronous generator of findings; it changes nothing.

finding.py     what was found, and what to do
postgresql.py  the server: version, durability, isolation, connections
redis.py       the server: version, persistence, eviction, rights
ledger.py      the tables: version, indexes, function, rights, bloat
fleet.py       queues and workers: who knows what, who hands over late, whose clock is wrong
"""
