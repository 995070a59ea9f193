"""PostgreSQL by way of SQLAlchemy: what coord asks of both, by public names.

engine.py         what is asked of an engine
transaction.py    what a session's transaction is and holds
schemas.py        under which schemas it works
target.py         which row of a mapped class, and which of its columns
acquisition.py    how a lock is taken
lock_function.py  by one function of the ledger's, where it is
place.py          where the ledger is
lost_answers.py   which answers will never come
pings.py          which connections a pool asks whether they live
"""
