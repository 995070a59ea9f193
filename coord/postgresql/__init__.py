"""PostgreSQL by way of SQLAlchemy and asyncpg: what coord knows of both beneath their public names is here.

engine.py       what is asked of an engine
transaction.py  what a session's transaction is and holds
schemas.py      under which schemas it works
acquisition.py  how a lock is taken
driver.py       asyncpg's connection beneath SQLAlchemy's
pipelining.py   connections on which some statements travel with the next one
ahead.py        what they are still owed for those
encoding.py     what asyncpg would send for a statement
flushing.py     a row that travels with its commit
"""
