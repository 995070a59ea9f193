"""PostgreSQL by way of SQLAlchemy: what coord asks of both, by public names.

engine.py         what is asked of an engine
transaction.py    what a session's transaction is and holds
schemas.py        under which schemas it works
target.py         which row of a mapped class, and which of its columns
acquisition.py    how a lock is taken
lock_function.py  by one function of the ledger's, where it is
"""
